"""From logits and one uniform number a row to a token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw"]

_BLOCK = 256


def draw(logits: Tensor, temperature: Tensor | None, floor: Tensor | None, u: Tensor) -> Tensor:
    """Inverse CDF of softmax(logits / temperature), tokens in the order of the vocabulary.

    logits: [R, V] float32; temperature: [R] float32 above 0, None for 1 everywhere; tokens whose
    logit is below floor [R] are left out, None keeps all; u: [R] float64 in (0, 1). Returns [R]
    int64.

    The cumulative sum of a large vocabulary is the slow part, so it runs twice over little: over
    sums of blocks, then inside the block in which u falls. Sums are kept in float64.
    """
    rows, vocab = logits.shape
    scaled = logits if temperature is None else logits / temperature.unsqueeze(1)
    mass = torch.softmax(scaled, dim=-1)
    if floor is not None:
        mass.masked_fill_(logits < floor.unsqueeze(1), 0.0)
    whole = vocab // _BLOCK
    sums = mass[:, : whole * _BLOCK].view(rows, whole, _BLOCK).sum(-1)
    if whole * _BLOCK < vocab:
        sums = torch.cat((sums, mass[:, whole * _BLOCK :].sum(-1, keepdim=True)), dim=1)
    ends = sums.double().cumsum(-1)
    target = u * ends[:, -1]
    block = _first_above(ends, sums, target)
    before = torch.where(
        block > 0, ends.gather(1, (block - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0.0
    )
    tokens = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = mass.gather(1, tokens.clamp_max(vocab - 1))
    inside.masked_fill_(tokens >= vocab, 0.0)
    offset = _first_above(inside.double().cumsum(-1), inside, target - before)
    return (block * _BLOCK + offset).clamp_max(vocab - 1)


def _first_above(ends: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds target; never one without mass.

    Rounding can put target at or above the last sum; the last part with mass is meant then.
    """
    found = torch.searchsorted(ends, target.unsqueeze(1), right=True).squeeze(1)
    at = torch.arange(parts.shape[1], device=parts.device)
    last = torch.where(parts > 0, at, 0).amax(-1)
    return torch.minimum(found, last)
