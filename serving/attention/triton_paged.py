"""Paged attention on a GPU by our own Triton kernels; import it only where triton is installed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serving.attention.base import AttentionBackend, StepInputs
from serving.kernels import triton

__all__ = ["TritonAttention"]


class TritonAttention(AttentionBackend):
    """Decodes by split keys, prefills by tiles of tokens; pages are walked in place.

    `StepInputs.tiles` is a pair: what `prefill_tiles` gives, on the device, and its shape.
    `processors` bounds how many multiprocessors a launch is laid out for (default: all).
    """

    name = "triton"

    def __init__(self, device: torch.device, processors: int | None = None) -> None:
        if processors is None and device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._processors = processors or 1

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
        heads, dim, kv_heads = q.shape[1], q.shape[2], kv.shape[3]
        if inputs.num_decodes:
            lens = inputs.context_lens if inputs.decode_lens is None else inputs.decode_lens
            triton.paged_decode(
                q,
                kv,
                page_tables=inputs.page_tables,
                table_rows=inputs.table_rows,
                lens=lens[: inputs.num_decodes],
                scale=scale,
                sliding_window=sliding_window,
                shape=triton.decode_shape(
                    inputs.num_decodes, kv_heads, dim, q.dtype, self._processors
                ),
                out=out,
            )
        if inputs.tiles is None:
            shape = triton.prefill_shape(
                heads, kv_heads, dim, q.dtype, longest=max(inputs.context_lens_host)
            )
            inputs.tiles = (self._tiles(inputs, shape.tokens(heads, kv_heads)), shape)
        tiles, shape = inputs.tiles
        triton.paged_prefill(
            q,
            kv,
            page_tables=inputs.page_tables,
            table_rows=inputs.table_rows,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            tiles=tiles,
            scale=scale,
            sliding_window=sliding_window,
            shape=shape,
            out=out,
        )
        return out

    @staticmethod
    def _tiles(inputs: StepInputs, tokens: int) -> Tensor:
        tiles = triton.prefill_tiles(
            np.array(inputs.query_starts_host, dtype=np.int32),
            np.array(inputs.context_lens_host, dtype=np.int32),
            inputs.num_decodes,
            tokens,
        )
        return torch.from_numpy(tiles).to(inputs.context_lens.device)
