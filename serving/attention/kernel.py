"""Paged attention by `serving.kernels`, which runs native code where the machine has it."""

from __future__ import annotations

from torch import Tensor

from serving import kernels
from serving.attention.base import AttentionBackend, StepInputs

__all__ = ["KernelAttention"]


class KernelAttention(AttentionBackend):
    """One call a layer; page tables are walked in place, nothing is gathered."""

    name = "kernel"

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
        return kernels.paged_attention(
            q,
            kv,
            query_starts=inputs.query_starts_host,
            context_lens=inputs.context_lens_host,
            page_tables=inputs.page_tables,
            page_size=inputs.page_size,
            scale=scale,
            sliding_window=sliding_window,
        )
