"""Attention over paged keys and values: block sizes, splits, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from serving.kernels.triton import attention_kernels

__all__ = [
    "DecodeShape",
    "PrefillShape",
    "decode_shape",
    "paged_decode",
    "paged_prefill",
    "prefill_shape",
    "prefill_tiles",
]

# The kernels carry no types of their own.
_kernels: Any = attention_kernels

_MAX_SPLITS = 32
_LEAST_SHARE = 128  # keys; a share of fewer costs more than it spreads


@dataclass(frozen=True)
class DecodeShape:
    """Keys a block, shares of the keys, warps and pipeline stages of a decode launch."""

    block: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PrefillShape:
    """Rows a tile (tokens times heads of one key-value head), keys a block, warps, stages."""

    tile: int
    block: int
    warps: int
    stages: int

    def tokens(self, heads: int, kv_heads: int) -> int:
        """New tokens of one sequence that one tile covers."""
        return max(1, self.tile // _power(heads // kv_heads))


def decode_shape(
    rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, processors: int
) -> DecodeShape:
    """For `rows` sequences on so many multiprocessors.

    Sequences differ in length, so there is room for shares of the longest even where rows alone
    would fill the GPU; short sequences leave that room unused.
    """
    splits = max(4, min(_MAX_SPLITS, 4 * processors // max(1, rows * kv_heads)))
    if rows * kv_heads >= 16 * processors:
        splits = 1
    if dtype is torch.float32:
        return DecodeShape(16 if head_dim > 128 else 32, splits, 4, 2)
    return DecodeShape(32, splits, 4 if head_dim > 128 else 2, 3)


def prefill_shape(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, longest: int = 0
) -> PrefillShape:
    """The fastest of the measured tiles for sequences of up to `longest` keys."""
    group = _power(heads // kv_heads)
    if dtype is torch.float32:
        return PrefillShape(max(32, group), 32 if head_dim <= 128 else 16, 4, 2)
    if head_dim > 128:
        return PrefillShape(max(64, group), 32, 8, 2)
    if longest > 1024:
        return PrefillShape(max(256, group), 64, 8, 2)
    return PrefillShape(max(128, group), 32, 4, 4)


def prefill_tiles(
    query_starts: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    num_decodes: int,
    tokens: int,
) -> NDArray[np.int32]:
    """(sequence, first new token) of each tile of the sequences behind the decodes: [P, 2] int32.

    Tiles with the most keys come first, so that no long one starts when all others are done.
    """
    counts = np.diff(query_starts)[num_decodes:]
    per = -(-counts // tokens)
    if not per.sum():
        return np.zeros((0, 2), dtype=np.int32)
    sequence = np.repeat(np.arange(num_decodes, num_decodes + len(counts)), per)
    ends = np.cumsum(per)
    first = (np.arange(ends[-1]) - np.repeat(ends - per, per)) * tokens
    keys = (context_lens[num_decodes:] - counts).repeat(per) + first
    order = np.argsort(-keys, kind="stable")
    return np.stack((sequence[order], first[order]), axis=1).astype(np.int32)


def paged_decode(
    q: Tensor,
    kv: Tensor,
    *,
    page_tables: Tensor,
    table_rows: Tensor | None,
    lens: Tensor,
    scale: float,
    sliding_window: int | None,
    shape: DecodeShape,
    out: Tensor,
) -> None:
    """Attend the first len(lens) rows of q [T, Hq, D], each the newest token of its sequence.

    lens: [S] int32 keys of each sequence, 0 leaves a row of `out` as it is. Sequence s has its
    pages in row `table_rows[s]` of page_tables (None: row s). Writes `out` [T, Hq, D].
    """
    rows, (_, heads, dim), kv_heads = lens.shape[0], q.shape, kv.shape[3]
    if not rows:
        return
    splits = shape.splits
    parts, weights = out, lens
    if splits > 1:
        parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
        weights = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    _kernels.decode_kernel[(rows, kv_heads, splits)](
        q, kv, page_tables, page_tables if table_rows is None else table_rows, lens, out, parts,
        weights, scale, sliding_window or 0,
        q.stride(0), q.stride(1), *kv.stride()[:4], page_tables.stride(0),
        out.stride(0), out.stride(1),
        heads, group, max(16, _power(group)), dim, max(16, _power(dim)), kv.shape[2], shape.block,
        splits, _LEAST_SHARE, sliding_window is not None, table_rows is not None, _precision(q),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if splits > 1:
        _kernels.merge_kernel[(rows, heads)](
            parts, weights, lens, out, sliding_window or 0, out.stride(0), out.stride(1),
            heads, dim, max(16, _power(dim)), shape.block, splits, _power(splits), _LEAST_SHARE,
            sliding_window is not None, num_warps=2,
        )  # fmt: skip


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    *,
    page_tables: Tensor,
    table_rows: Tensor | None,
    query_starts: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    sliding_window: int | None,
    shape: PrefillShape,
    out: Tensor,
) -> None:
    """Causal attention of the tokens that `tiles` [P, 2] int32 covers (see `prefill_tiles`).

    q, out: [T, Hq, D]; query_starts [S + 1] and context_lens [S] int32; page_tables and table_rows
    as in `paged_decode`. Writes the covered rows of `out`.
    """
    if not tiles.shape[0]:
        return
    (_, heads, dim), kv_heads = q.shape, kv.shape[3]
    group = heads // kv_heads
    _kernels.prefill_kernel[(kv_heads, tiles.shape[0])](
        q, kv, page_tables, page_tables if table_rows is None else table_rows, query_starts,
        context_lens, tiles, out, scale, sliding_window or 0,
        q.stride(0), q.stride(1), *kv.stride()[:4], page_tables.stride(0),
        out.stride(0), out.stride(1),
        group, _power(group), dim, max(16, _power(dim)), kv.shape[2], shape.tile, shape.block,
        sliding_window is not None, table_rows is not None, _precision(q),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def _power(value: int) -> int:
    return int(triton.next_power_of_2(value))


def _precision(q: Tensor) -> str:
    """Float32 products stay float32: greedy decoding must agree with the reference."""
    return "ieee" if q.dtype is torch.float32 else "tf32"
