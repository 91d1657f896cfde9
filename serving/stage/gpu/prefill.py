"""Which kernels attend the prefills of steps that are not recorded: measured once, at start."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
import torch

from serving.attention.flashinfer_paged import (
    FlashInferPlan,
    FlashInferPrefill,
    flashinfer_installed,
)
from serving.errors import ConfigError
from serving.kernels.device import gpu_kernels
from serving.stage.mirror import Rows

__all__ = ["LongPrefills", "long_prefills"]

#: Below so many keys our own kernels are as fast, and they need no plan.
_LEAST_KEYS = 512
_DIMS = (64, 128, 256)
_PROMPTS, _TOKENS = 2, 2048  # of the measurement


class LongPrefills:
    """FlashInfer's kernels for micro-batches with long prefills."""

    def __init__(self, prefill: FlashInferPrefill) -> None:
        self._prefill = prefill

    def plan(self, rows: Rows) -> FlashInferPlan | None:
        """The prefills of a micro-batch, or None where our own kernels are meant to attend them."""
        first = rows.num_decodes
        lens = rows.context_lens[first:]
        if not len(lens) or int(lens.max()) < _LEAST_KEYS:
            return None
        starts = rows.query_starts[first:] - rows.query_starts[first]
        return self._prefill.plan(starts, lens, rows.page_tables[first:])


def long_prefills(
    asked: Literal["auto", "triton", "flashinfer"],
    device: torch.device,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    windowed: bool,
) -> LongPrefills | None:
    """FlashInfer where it is asked for, or installed, able and faster; None for our own kernels.

    windowed: some layer sees only a window of keys. Raises ConfigError where FlashInfer is asked
    for and cannot serve. The first use on a machine compiles its kernels, which takes a minute.
    """
    if asked == "triton":
        return None
    why = ""
    if not flashinfer_installed():
        why = "the package flashinfer-python is not installed"
    elif dtype.itemsize != 2 or head_dim not in _DIMS or windowed:
        why = (
            f"it serves bfloat16 and float16, head sizes {', '.join(map(str, _DIMS))} and layers "
            "that see all keys"
        )
    if why:
        _without(asked, why)
        return None
    shape: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "dtype": dtype,
    }
    try:
        prefill = FlashInferPrefill(device, **shape)
        theirs, ours = _measure(prefill, device, **shape)
    # The package compiles with whatever compiler is there: many kinds of error, one answer.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _without(asked, f"it failed to start: {first}")
        return None
    chosen = asked == "flashinfer" or theirs < ours
    print(
        f"attention of {_PROMPTS} prompts of {_TOKENS} tokens, one layer: flashinfer "
        f"{theirs:.2f} ms, triton {ours:.2f} ms; long prompts use "
        f"{'flashinfer' if chosen else 'triton'}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return LongPrefills(prefill) if chosen else None


def _without(asked: str, why: str) -> None:
    if asked == "flashinfer":
        raise ConfigError(
            f"FlashInfer cannot be used: {why}. Install the extra with pip install 'lectern[gpu]', "
            "or use --attention triton.",
            "--attention",
        )
    print(f"attention by triton alone, without flashinfer: {why}", file=sys.stderr, flush=True)


@torch.inference_mode()
def _measure(
    prefill: FlashInferPrefill,
    device: torch.device,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Milliseconds of FlashInfer and of our own kernels for the same prompts, the best of a few."""
    kernels = gpu_kernels()
    if kernels is None:
        raise AssertionError("a stage on a GPU has kernels of its own")
    per = -(-_TOKENS // page_size)
    lens = np.full(_PROMPTS, _TOKENS, dtype=np.int32)
    starts = np.arange(_PROMPTS + 1, dtype=np.int32) * _TOKENS
    tables = np.arange(_PROMPTS * per, dtype=np.int32).reshape(_PROMPTS, per)
    kv = torch.zeros(
        _PROMPTS * per, 2, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
    )
    q = torch.zeros(_PROMPTS * _TOKENS, num_heads, head_dim, dtype=dtype, device=device)
    out = torch.empty_like(q)
    plan = prefill.plan(starts, lens, tables)
    shape = kernels.prefill_shape(num_heads, num_kv_heads, head_dim, dtype, longest=_TOKENS)
    tiles = kernels.prefill_tiles(starts, lens, 0, shape.tokens(num_heads, num_kv_heads))
    on_device = [torch.from_numpy(part).to(device) for part in (starts, lens, tables, tiles)]

    def ours() -> None:
        kernels.paged_prefill(
            q, kv, page_tables=on_device[2], table_rows=None, query_starts=on_device[0],
            context_lens=on_device[1], tiles=on_device[3], scale=head_dim**-0.5,
            sliding_window=None, shape=shape, out=out,
        )  # fmt: skip

    return _best(lambda: plan.run(q, kv, out)), _best(ours)


def _best(launch: Any) -> float:
    launch()
    found = []
    for _ in range(5):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)))
    return min(found)
