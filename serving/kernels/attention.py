"""Attention over paged keys and values: native for bf16 on the CPU, plain torch for the rest."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.kernels import reference
from serving.kernels.library import AttentionFields, native

__all__ = ["HEAD_DIMS", "paged_attention"]

HEAD_DIMS = (32, 64, 96, 128, 192, 256)


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
    native_dtype = q.dtype is torch.bfloat16 and kv.dtype is torch.bfloat16
    library = native() if native_dtype and q.device.type == "cpu" and q.numel() else None
    dim = q.shape[2]
    if (
        library is None
        or dim not in HEAD_DIMS
        or not kv.is_contiguous()
        or scale <= 0
        or q.stride(2) != 1
        or q.stride(1) != dim
    ):
        return reference.paged_attention(
            q,
            kv,
            query_starts=query_starts,
            context_lens=context_lens,
            page_tables=page_tables,
            page_size=page_size,
            scale=scale,
            sliding_window=sliding_window,
        )
    tables = page_tables.to(torch.int32).contiguous()
    starts = (ctypes.c_int32 * len(query_starts))(*query_starts)
    lengths = (ctypes.c_int32 * len(context_lens))(*context_lens)
    fields = AttentionFields(
        kv=kv.data_ptr(),
        page_tables=tables.data_ptr(),
        table_stride=tables.shape[1],
        query_starts=ctypes.addressof(starts),
        context_lens=ctypes.addressof(lengths),
        sequences=len(context_lens),
        page_size=page_size,
        heads=q.shape[1],
        kv_heads=kv.shape[3],
        head_dim=dim,
        scale=scale,
        window=sliding_window or 0,
    )
    out = torch.empty(q.shape, dtype=q.dtype)
    library.lectern_attention(
        q.data_ptr(),
        q.stride(0),
        ctypes.byref(fields),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
