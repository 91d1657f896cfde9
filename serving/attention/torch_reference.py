"""Paged attention in plain torch: for checking, and where no native kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serving.attention.base import AttentionBackend, StepInputs

__all__ = ["TorchAttention"]


class TorchAttention(AttentionBackend):
    """All decode rows in one masked product, every prefill by itself."""

    name = "torch"

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        inputs: StepInputs,
        *,
        scale: float,
        sliding_window: int | None,
        layer: int,
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        decodes = inputs.num_decodes
        if decodes:
            out[:decodes] = _decode(q[:decodes], kv, inputs, scale, sliding_window)
        for sequence in range(decodes, len(inputs.context_lens_host)):
            first, last = inputs.query_starts_host[sequence : sequence + 2]
            out[first:last] = _prefill(q[first:last], kv, inputs, sequence, scale, sliding_window)
        return out


def _decode(q: Tensor, kv: Tensor, inputs: StepInputs, scale: float, window: int | None) -> Tensor:
    """q: [B, Hq, D], one token a sequence -> [B, Hq, D].

    The query heads that share a key-value head stand as rows of one product, so keys are read
    once and never repeated.
    """
    rows, heads, dim = q.shape
    kv_heads, page_size = kv.shape[3], inputs.page_size
    longest = max(inputs.context_lens_host[:rows])
    pages = inputs.page_tables[:rows, : -(-longest // page_size)].long().clamp_min(0)
    held = kv[pages]  # [B, pages, 2, page_size, Hkv, D], a copy
    at = torch.arange(pages.shape[1] * page_size, device=q.device)
    lengths = inputs.context_lens[:rows].unsqueeze(1)
    mask = at < lengths
    if window is not None:
        mask &= at >= lengths - window
    # Slots past a sequence's end may hold what another one left, even NaN, which no mask stops.
    held.masked_fill_(~mask.view(rows, -1, 1, page_size, 1, 1), 0.0)
    keys = held[:, :, 0].reshape(rows, -1, kv_heads, dim).transpose(1, 2)
    values = held[:, :, 1].reshape(rows, -1, kv_heads, dim).transpose(1, 2)
    attended = functional.scaled_dot_product_attention(
        q.view(rows, kv_heads, heads // kv_heads, dim),
        keys.to(q.dtype),
        values.to(q.dtype),
        attn_mask=mask[:, None, None, :],
        scale=scale,
    )
    return attended.reshape(rows, heads, dim)


def _prefill(
    q: Tensor, kv: Tensor, inputs: StepInputs, sequence: int, scale: float, window: int | None
) -> Tensor:
    """q: [n, Hq, D], the newest n tokens of one sequence -> [n, Hq, D]."""
    count, heads, dim = q.shape
    length, page_size, kv_heads = inputs.context_lens_host[sequence], inputs.page_size, kv.shape[3]
    # Keys older than the oldest query's window are not read.
    oldest = 0 if window is None else max(0, length - count - window + 1)
    first_page = oldest // page_size
    begin = first_page * page_size
    pages = inputs.page_tables[sequence, first_page : -(-length // page_size)].long()
    held = kv[pages]
    keys = held[:, 0].reshape(-1, kv_heads, dim)[: length - begin].transpose(0, 1)
    values = held[:, 1].reshape(-1, kv_heads, dim)[: length - begin].transpose(0, 1)
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
    mask = None
    if begin or count != length or window is not None:
        at = torch.arange(length - count, length, device=q.device).unsqueeze(1)
        seen = torch.arange(begin, length, device=q.device).unsqueeze(0)
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
    attended = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys.to(q.dtype).unsqueeze(0),
        values.to(q.dtype).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return attended[0].transpose(0, 1)
