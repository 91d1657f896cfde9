"""The largest logits of each row without looking at every one of them twice."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest"]

_BLOCK = 128


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and token ids of the `count` largest logits, best first. [R, V] -> [R, count] twice.

    The n largest values lie in the n blocks with the largest maxima, so one pass over the row
    finds the blocks, and only their tokens are ordered. Which of several equal values is named is
    left open; the values themselves are exact.
    """
    rows, vocab = logits.shape
    whole = vocab // _BLOCK
    if count * _BLOCK * 4 > vocab:
        found = logits.topk(count, dim=-1)
        return found.values, found.indices
    blocks = logits[:, : whole * _BLOCK].view(rows, whole, _BLOCK)
    chosen = blocks.amax(-1).topk(count, dim=-1).indices
    row = torch.arange(rows, device=logits.device).unsqueeze(1)
    values = torch.cat((blocks[row, chosen].view(rows, -1), logits[:, whole * _BLOCK :]), dim=1)
    found = values.topk(count, dim=-1)
    # Behind the chosen blocks stands the rest of the vocabulary that fills no block.
    block, offset = found.indices // _BLOCK, found.indices % _BLOCK
    in_block = chosen.gather(1, block.clamp_max(count - 1)) * _BLOCK + offset
    in_rest = found.indices - count * _BLOCK + whole * _BLOCK
    return found.values, torch.where(block < count, in_block, in_rest)
