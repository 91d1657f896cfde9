"""Paged attention on a GPU by our own Triton kernels; import it only where triton is installed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serving.attention.base import AttentionBackend, StepInputs
from serving.attention.flashinfer_paged import FlashInferPlan
from serving.kernels import triton

__all__ = ["TritonAttention", "TritonPlan"]


@dataclass(frozen=True)
class TritonPlan:
    """How a micro-batch's attention is cut up, for all layers: `StepInputs.attention_plan`.

    shares [W, 4] and part_starts [S + 1] are those of `decode_shares`, tiles [P, 2] those of
    `prefill_tiles` for `tile_shape`; all int32 on the device.
    """

    shares: Tensor
    part_starts: Tensor
    tiles: Tensor
    tile_shape: triton.PrefillShape
    prefills: FlashInferPlan | None = None
    """If given, attends the prefills in place of the tiles."""


class TritonAttention(AttentionBackend):
    """Decodes by shares of keys, prefills by tiles of tokens; pages are walked in place.

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
        if inputs.attention_plan is None:
            inputs.attention_plan = self._plan(q, kv.shape[3], inputs)
        plan: TritonPlan = inputs.attention_plan
        triton.paged_decode(
            q,
            kv,
            page_tables=inputs.page_tables,
            table_rows=inputs.table_rows,
            lens=inputs.context_lens,
            shares=plan.shares,
            part_starts=plan.part_starts,
            scale=scale,
            sliding_window=sliding_window,
            shape=triton.decode_shape(q.shape[2], q.dtype),
            out=out,
        )
        if plan.prefills is not None:
            first = inputs.num_decodes
            plan.prefills.run(q[first:], kv, out[first:])
            return out
        triton.paged_prefill(
            q,
            kv,
            page_tables=inputs.page_tables,
            table_rows=inputs.table_rows,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            tiles=plan.tiles,
            scale=scale,
            sliding_window=sliding_window,
            shape=plan.tile_shape,
            out=out,
        )
        return out

    def _plan(self, q: Tensor, kv_heads: int, inputs: StepInputs) -> TritonPlan:
        device, heads, decodes = q.device, q.shape[1], inputs.num_decodes
        lens = np.array(inputs.context_lens_host, dtype=np.int32)
        shape = triton.prefill_shape(
            heads, kv_heads, q.shape[2], q.dtype, longest=max(inputs.context_lens_host)
        )
        tiles = triton.prefill_tiles(
            np.array(inputs.query_starts_host, dtype=np.int32),
            lens,
            decodes,
            shape.tokens(heads, kv_heads),
        )
        room = triton.share_room(decodes, kv_heads, self._processors)
        shares, part_starts = triton.decode_shares(lens[:decodes], room)
        on_device = [torch.from_numpy(part).to(device) for part in (shares, part_starts, tiles)]
        return TritonPlan(on_device[0], on_device[1], on_device[2], shape)
