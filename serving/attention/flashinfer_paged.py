"""Prefill attention by FlashInfer, an optional package; decodes stay with our own kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FlashInferPlan", "FlashInferPrefill", "flashinfer_installed"]

_WORKSPACE = 128 << 20  # bytes, what the package recommends
_ROTATION = 4  # plans that may be under way at once


def flashinfer_installed() -> bool:
    """Whether the package can be imported; importing it takes seconds, this does not."""
    return importlib.util.find_spec("flashinfer") is not None


@dataclass
class _Slot:
    """A wrapper of the package and the moment at which its last plan had reached the device."""

    wrapper: Any
    planned: torch.cuda.Event | None = field(default=None)


@dataclass(frozen=True)
class FlashInferPlan:
    """The prefills of one micro-batch, for all layers."""

    wrapper: Any

    def run(self, q: Tensor, kv: Tensor, out: Tensor) -> None:
        """q, out: [T, Hq, D], the rows of the prefills alone; kv: one layer's pages."""
        self.wrapper.run(q, kv, out=out)


class FlashInferPrefill:
    """Plans and runs causal attention of prefills over pages of one shape of layer.

    A plan is laid out on the host and copied from pinned memory that belongs to a wrapper. Plans
    run ahead of the device, so wrappers are used in turn, and one is planned again only when its
    last copy has been made.

    Raises whatever the package raises where it does not serve the shape or cannot be compiled.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
    ) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._device = device
        self._shape = (num_heads, num_kv_heads, head_dim, page_size)
        self._dtype = dtype
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._slots = [
            _Slot(BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")) for _ in range(_ROTATION)
        ]
        self._next = 0

    def plan(
        self,
        query_starts: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        page_tables: NDArray[np.int32],
    ) -> FlashInferPlan:
        """Lay out the prefills of a micro-batch; launches on the current stream, waits for nothing.

        query_starts: [S + 1] from 0; context_lens: [S], these tokens included; page_tables:
        [S, longest]. All of the prefills alone.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        if slot.planned is not None:
            slot.planned.synchronize()
        heads, kv_heads, dim, page_size = self._shape
        starts, pages, last = _layout(context_lens, page_tables, page_size)
        pinned = torch.from_numpy(pages).pin_memory()
        slot.wrapper.plan(
            torch.from_numpy(query_starts.astype(np.int32)),
            torch.from_numpy(starts),
            pinned.to(self._device, non_blocking=True),
            torch.from_numpy(last),
            heads,
            kv_heads,
            dim,
            page_size,
            causal=True,
            q_data_type=self._dtype,
        )
        slot.planned = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slot.planned.record()
        return FlashInferPlan(slot.wrapper)


def _layout(
    context_lens: NDArray[np.int32], page_tables: NDArray[np.int32], page_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Pages as the package wants them: where each sequence's begin in one flat list [S + 1], the
    list, and the keys on each last page [S]."""
    counts = -(-context_lens // page_size)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    used = np.arange(page_tables.shape[1]) < counts[:, None]
    last = context_lens - (counts - 1) * page_size
    return starts, page_tables[used].astype(np.int32), last.astype(np.int32)
