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
    inside = torch.arange(_BLOCK, device=logits.device)
    ids = (chosen.unsqueeze(2) * _BLOCK + inside).view(rows, -1)
    if whole * _BLOCK < vocab:
        rest = torch.arange(whole * _BLOCK, vocab, device=logits.device)
        ids = torch.cat((ids, rest.expand(rows, -1)), dim=1)
    found = logits.gather(1, ids).topk(count, dim=-1)
    return found.values, ids.gather(1, found.indices)
