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
    "decode_shares",
    "paged_decode",
    "paged_prefill",
    "prefill_shape",
    "prefill_tiles",
    "share_room",
]

# The kernels carry no types of their own.
_kernels: Any = attention_kernels

_SHARE_STEP = 32  # keys
_LEAST_SHARE = 128  # a share of fewer keys costs more than it spreads


@dataclass(frozen=True)
class DecodeShape:
    """Keys a block, warps and pipeline stages of a decode launch."""

    block: int
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


def decode_shape(head_dim: int, dtype: torch.dtype) -> DecodeShape:
    """The fastest of the measured blocks."""
    if dtype is torch.float32:
        return DecodeShape(16 if head_dim > 128 else 32, 4, 2)
    return DecodeShape(32, 4 if head_dim > 128 else 2, 3)


def merge_shape(rows: int) -> tuple[int, int]:
    """Parts at a time and heads a program. Few sequences have many parts each; of many most have
    one, and then the programs that find nothing to do are what costs."""
    return (16, 1) if rows <= 16 else (4, 8)


def share_room(sequences: int, kv_heads: int, processors: int) -> int:
    """Shares that so many sequences may be cut into: about six programs a multiprocessor more."""
    return sequences + max(sequences // 2, -(-6 * processors // kv_heads))


def decode_shares(
    lens: NDArray[np.int32], room: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut the keys of decodes into at most `room` shares of about equal size, the largest first.

    Sequences differ in length, and the longest decides when a launch ends, so it is cut. Returns
    (sequence, first key, one past the last, part or -1) of each share, [W, 4], and the first part
    of each sequence, [S + 1]. Every length is at least 1 and room is more than the sequences.
    """
    count = len(lens)
    if not count:
        return np.zeros((0, 4), dtype=np.int32), np.zeros(1, dtype=np.int32)
    # Each sequence rounds up by less than one share, so this many always fit.
    even = np.array(-(-int(lens.sum()) // (room - count)))
    share = np.maximum(_LEAST_SHARE, _round_up(even))
    per = -(-lens // share)
    size = _round_up(-(-lens // per))
    starts = np.concatenate(([0], np.cumsum(per))).astype(np.int32)
    sequence = np.repeat(np.arange(count), per)
    part = np.arange(starts[-1])
    first = (part - starts[sequence]) * size[sequence]
    last = np.minimum(first + size[sequence], lens[sequence])
    part[per[sequence] == 1] = -1
    order = np.argsort(first - last, kind="stable")
    shares = np.stack((sequence, first, last, part), axis=1)[order]
    return shares.astype(np.int32), starts


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
    shares: Tensor,
    part_starts: Tensor,
    scale: float,
    sliding_window: int | None,
    shape: DecodeShape,
    out: Tensor,
) -> None:
    """Attend the rows of q [T, Hq, D] that `shares` [W, 4] names, each a sequence's newest token.

    lens: int32 keys of each sequence; shares and part_starts [S + 1]: see `decode_shares`, where a
    negative sequence is no share. Sequence s has its pages in row `table_rows[s]` of page_tables
    (None: row s). Writes those rows of `out` [T, Hq, D] and no other.
    """
    (_, heads, dim), kv_heads = q.shape, kv.shape[3]
    count, rows = shares.shape[0], part_starts.shape[0] - 1
    if not count:
        return
    parts = torch.empty(count, heads, dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(count, heads, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    _kernels.decode_kernel[(count, kv_heads)](
        q, kv, page_tables, page_tables if table_rows is None else table_rows, lens, shares, out,
        parts, weights, scale, sliding_window or 0,
        q.stride(0), q.stride(1), *kv.stride()[:4], page_tables.stride(0),
        out.stride(0), out.stride(1),
        heads, group, max(16, _power(group)), dim, max(16, _power(dim)), kv.shape[2], shape.block,
        sliding_window is not None, table_rows is not None, _precision(q),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    at_once, together = merge_shape(rows)
    _kernels.merge_kernel[(rows, -(-heads // together))](
        parts, weights, part_starts, out, out.stride(0), out.stride(1),
        heads, dim, max(16, _power(dim)), at_once, together, num_warps=2 if together == 1 else 4,
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


def _round_up(keys: NDArray[Any]) -> NDArray[Any]:
    return -(-keys // _SHARE_STEP) * _SHARE_STEP


def _power(value: int) -> int:
    return int(triton.next_power_of_2(value))


def _precision(q: Tensor) -> str:
    """Float32 products stay float32: greedy decoding must agree with the reference."""
    return "ieee" if q.dtype is torch.float32 else "tf32"
