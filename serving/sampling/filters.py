"""top-k, top-p and min-p as one lowest logit for each row.

Each filter keeps every token at or above some logit: the k-th largest, the last one that the mass
p needs, or the largest plus temperature * log(min_p). The highest of these bounds is all that the
draw has to know. Tokens that tie with the bound are all kept, so what a row keeps depends on its
logits alone, not on how a sort happened to order equal values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serving.sampling.candidates import largest

__all__ = ["logit_floor"]

_FIRST_LOOK = 128
_BINS = 2048
# Tokens this many e-folds below the best add nothing to a sum in float64.
_DEPTH = 60.0


def logit_floor(
    logits: Tensor,
    mass: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    max_top_k: int,
) -> Tensor:
    """The lowest logit each row keeps. logits: [R, V] float32; returns [R] float32.

    mass: [R, V], softmax(logits / temperature); temperature: [R] above 0; top_k: [R] int64, 0 for
    off and at most V; top_p: [R], 1 for off; min_p: [R], 0 for off; max_top_k: the largest top_k,
    known on the host. In order, as in transformers: temperature, top-k, top-p of what top-k left,
    min-p.
    """
    best = mass.amax(-1)
    floor = logits.amax(-1) + temperature * min_p.log()
    if max_top_k:
        at = torch.nonzero(top_k > 0).squeeze(1)
        values, _ = largest(logits[at], max_top_k)
        bound = _among_top_k(values, temperature[at], top_k[at], top_p[at].double())
        floor[at] = torch.maximum(floor[at], bound)
    at = torch.nonzero((top_k == 0) & (top_p < 1.0)).squeeze(1)
    if at.numel():
        # The best token's share of the whole gives the mass of the whole relative to it.
        target = top_p[at].double() / best[at].double()
        values, _ = largest(logits[at], min(_FIRST_LOOK, logits.shape[1]))
        bound, enough = _first_look(values, temperature[at], target)
        for row in torch.nonzero(~enough).squeeze(1).tolist():
            one = at[row]
            bound[row] = _by_histogram(logits[one], temperature[one], target[row])
        floor[at] = torch.maximum(floor[at], bound)
    return floor


def _among_top_k(values: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The bound of top-k and of top-p within it; values: the largest logits [R, C], sorted."""
    within = torch.arange(values.shape[1], device=values.device) < top_k.unsqueeze(1)
    weights = _weights(values, temperature) * within
    ends = weights.cumsum(-1)
    target = top_p.unsqueeze(1) * ends[:, -1:]
    # A token stays while the mass before it falls short of the target; the first one always.
    short = (ends - weights < target) | (top_p >= 1.0).unsqueeze(1)
    needed = (short & within).sum(-1).clamp_min(1)
    return values.gather(1, (needed - 1).unsqueeze(1)).squeeze(1)


def _first_look(values: Tensor, temperature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The bound of top-p if these sorted logits [R, C] hold enough mass, and whether they do."""
    ends = _weights(values, temperature).cumsum(-1)
    needed = (ends < target.unsqueeze(1)).sum(-1)
    enough = needed < values.shape[1]
    at = needed.clamp_max(values.shape[1] - 1)
    return values.gather(1, at.unsqueeze(1)).squeeze(1), enough


def _weights(values: Tensor, temperature: Tensor) -> Tensor:
    """Mass relative to the first value's."""
    return ((values - values[:, :1]) / temperature.unsqueeze(1)).double().exp()


def _by_histogram(logits: Tensor, temperature: Tensor, target: Tensor) -> Tensor:
    """The bound of top-p for one flat row [V]: find the bin where the mass is reached, sort that.

    A full sort of a large vocabulary takes some ten times as long.
    """
    high = logits.max()
    low = torch.maximum(logits.min(), high - _DEPTH * temperature)
    weights = ((logits - high) / temperature).double().exp()
    if not bool(high > low):
        return high
    bins = ((logits - low) / (high - low) * (_BINS - 1)).clamp_(0, _BINS - 1).long()
    above = torch.bincount(bins, weights, _BINS).flip(0).cumsum(0)
    # From the top, the first bin at whose end the target is reached (the last one by rounding).
    found = int((above < target).sum().clamp_max(_BINS - 1))
    inside = logits[bins == _BINS - 1 - found].sort(descending=True).values
    if inside.numel() == 0:
        return logits.min()
    before = above[found - 1] if found else torch.zeros_like(target)
    ends = before + ((inside - high) / temperature).double().exp().cumsum(0)
    return inside[int((ends < target).sum().clamp_max(inside.numel() - 1))]
