"""From each row's probability mass and one uniform number to a token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw"]

_BLOCK = 256


def draw(mass: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF, tokens in the order of the vocabulary.

    mass: [R, V] float32, not negative and not all zero, of any sum; u: [R] float64 in (0, 1).
    Returns [R] int64.

    The cumulative sum of a large vocabulary is the slow part, so it runs twice over little: over
    sums of blocks, then inside the block in which u falls. Sums are kept in float64.
    """
    rows, vocab = mass.shape
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
    tokens = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=mass.device)
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
