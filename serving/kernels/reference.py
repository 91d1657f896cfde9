"""Every kernel written in plain torch: always correct, on any device and dtype.

These functions are what the native code is measured against, and what runs where there is no
compiler, no AVX-512, or a dtype the native code does not serve. In float32 they do the same
operations in the same order as the transformers modelling code, so that greedy decoding agrees
token for token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary_and_write_kv",
    "silu_and_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; the mean is in float32.

    x: [..., H]; weight: [H]; returns a new tensor like x.
    """
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`total = x + residual`; returns `(rms_norm(total), total)`. All [T, H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(x[:, :I]) * x[:, I:]` of a fused gate-and-up product. x: [T, 2I] -> [T, I]."""
    half = x.shape[-1] // 2
    return functional.silu(x[..., :half]) * x[..., half:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (turned * sin)


def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv: Tensor,
    slot_mapping: Tensor,
    page_size: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise (if asked) and rotate q and k, write k and v to their slots, return q.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; cos_sin: [P, D], cosines in the first D/2 columns and sines in
    the rest; kv: [pages, 2, page_size, Hkv, D]; slot_mapping: [T], `page * page_size + offset`, a
    negative slot writes nothing. q_norm, k_norm: [D] weights of a per-head RMS norm.
    """
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    half = q.shape[-1] // 2
    rows = cos_sin[positions].to(q.dtype)
    cos = torch.cat((rows[:, :half], rows[:, :half]), dim=-1).unsqueeze(1)
    sin = torch.cat((rows[:, half:], rows[:, half:]), dim=-1).unsqueeze(1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if bool((slot_mapping < 0).any()):
        held = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[held], k[held], v[held]
    pages = torch.div(slot_mapping, page_size, rounding_mode="floor")
    offsets = slot_mapping % page_size
    kv[pages, 0, offsets] = k.to(kv.dtype)
    kv[pages, 1, offsets] = v.to(kv.dtype)
    return q


def paged_attention(
    q: Tensor,
    kv: Tensor,
    *,
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    page_tables: Tensor,
    page_size: int,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over its pages.

    q: [T, Hq, D]; kv: [pages, 2, page_size, Hkv, D], already holding these tokens' keys and values;
    sequence s owns rows `query_starts[s]:query_starts[s + 1]` of q and `context_lens[s]` keys,
    these rows being the newest; page_tables: [S, max_pages]. A window of w lets a query see itself
    and the w - 1 keys before it. Returns [T, Hq, D].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads, kv_heads = q.shape[1], kv.shape[3]
    for s in range(len(context_lens)):
        first, last, length = query_starts[s], query_starts[s + 1], context_lens[s]
        count = last - first
        if count == 0:
            continue
        begin = 0
        if sliding_window is not None:
            begin = max(0, length - count - sliding_window + 1) // page_size * page_size
        pages = page_tables[s, begin // page_size : -(-length // page_size)].long()
        held = kv[pages]
        keys = held[:, 0].reshape(-1, kv_heads, q.shape[2])[: length - begin].transpose(0, 1)
        values = held[:, 1].reshape(-1, kv_heads, q.shape[2])[: length - begin].transpose(0, 1)
        if heads != kv_heads:
            keys = keys.repeat_interleave(heads // kv_heads, dim=0)
            values = values.repeat_interleave(heads // kv_heads, dim=0)
        at = torch.arange(length - count, length, device=q.device).unsqueeze(1)
        seen = torch.arange(begin, length, device=q.device).unsqueeze(0)
        mask = seen <= at
        if sliding_window is not None:
            mask &= seen > at - sliding_window
        attended = functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1).unsqueeze(0),
            keys.to(q.dtype).unsqueeze(0),
            values.to(q.dtype).unsqueeze(0),
            attn_mask=mask,
            scale=scale,
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out
