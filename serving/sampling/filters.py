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

_FIRST_CANDIDATES = 128
_GROWTH = 8


def logit_floor(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_top_k: int
) -> Tensor:
    """The lowest logit each row keeps. logits: [R, V] float32; returns [R] float32.

    temperature: [R] above 0; top_k: [R] int64, 0 for off; top_p: [R], 1 for off; min_p: [R], 0 for
    off; max_top_k: the largest top_k of all rows, known on the host. In order, as in transformers:
    temperature, top-k, top-p of what top-k left, min-p.
    """
    rows, vocab = logits.shape
    top_k = torch.where(top_k >= vocab, 0, top_k)
    highest = logits.amax(-1)
    floor = highest + temperature * min_p.log()
    has_k, has_p = top_k > 0, top_p < 1.0
    wanted = torch.nonzero(has_k | has_p).squeeze(1)
    # Only a top-p without top-k can need more candidates than the first look gives.
    count = min(max(_FIRST_CANDIDATES, max_top_k if max_top_k < vocab else 0), vocab)
    total = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    open_ended = torch.nonzero(has_p & ~has_k).squeeze(1)
    if open_ended.numel():
        scaled = (logits[open_ended] - highest[open_ended, None]) / temperature[open_ended, None]
        total[open_ended] = scaled.exp_().sum(-1).double()
    while wanted.numel():
        candidates, _ = largest(logits[wanted] if wanted.numel() < rows else logits, count)
        bound, enough = _bound(
            candidates,
            temperature[wanted],
            top_k[wanted],
            top_p[wanted].double(),
            total[wanted],
        )
        if count == vocab:
            enough = torch.ones_like(enough)
        done = wanted[enough]
        floor[done] = torch.maximum(floor[done], bound[enough])
        wanted = wanted[~enough]
        # Beyond an eighth of the vocabulary one full sort is cheaper than another look.
        count = count * _GROWTH if count * _GROWTH * 8 <= vocab else vocab
    return floor


def _bound(
    candidates: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """The bound of top-k and top-p within sorted candidates [R, C], and whether C were enough.

    `total` is the mass of the whole vocabulary relative to the largest logit, for rows without
    top-k.
    """
    count = candidates.shape[1]
    limited = top_k > 0
    kept = torch.where(limited, top_k.clamp_max(count), count)
    at = torch.arange(count, device=candidates.device)
    weights = ((candidates - candidates[:, :1]) / temperature.unsqueeze(1)).double().exp()
    weights.masked_fill_(at >= kept.unsqueeze(1), 0.0)
    ends = weights.cumsum(-1)
    target = top_p * torch.where(limited, ends[:, -1], total)
    # Keep a token while the mass before it falls short of the target; the first one always.
    short = (ends - weights < target.unsqueeze(1)) & (at < kept.unsqueeze(1))
    short |= (top_p >= 1.0).unsqueeze(1) & (at < kept.unsqueeze(1))
    needed = short.sum(-1).clamp_min(1)
    bound = candidates.gather(1, (needed - 1).unsqueeze(1)).squeeze(1)
    enough = limited | (needed < count) | (ends[:, -1] >= target)
    return bound, enough
