"""The lowest logit that top-k, top-p and min-p keep, and the largest logits, without a sort.

`selection_kernels.py` says how they are found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from serving.kernels.triton.selection_kernels import (
    bound_kernel,
    cut_kernel,
    gather_kernel,
    narrow_kernel,
    parts_kernel,
)

__all__ = ["BLOCK", "WIDE", "Candidates", "Floors", "candidates", "filter_floors"]

BLOCK = 1024  # logits that one program reads
PART = 128  # a block's maximum is kept for each part of so many logits
_LIST = 4096  # candidates of a row that fit its list
WIDE = 8192  # logits that one program looks at together where it goes over a whole row

# The kernels carry no types of their own.
_parts: Any = parts_kernel
_bound: Any = bound_kernel
_gather: Any = gather_kernel
_narrow_rows: Any = narrow_kernel
_cut: Any = cut_kernel


@dataclass(frozen=True)
class Floors:
    """For R rows: `floor` [R] float32, the lowest logit that each keeps, -inf for all; `maxima`
    [R, blocks, parts] float32, of rows with filters the largest logit of each part of a block."""

    floor: Tensor
    maxima: Tensor


@dataclass(frozen=True)
class Candidates:
    """The logits of R rows that may be among a row's k largest.

    The first min(count, room) entries of `values` and `ids` [R, room], in no order; a row of which
    `count` [R] says more than room must be looked at as a whole. `best` [R] is its largest logit
    and `total` [R] float64 the sum of exp(logit - best). Rows with k = 0 hold nothing of meaning.
    """

    values: Tensor
    ids: Tensor
    count: Tensor
    best: Tensor
    total: Tensor
    room: int = _LIST


class _State(NamedTuple):
    """What is known of each row's answer, all [R]: it lies between low and high; number and mass
    (in fixed point) are what lies above high, listed the candidates in the row's list."""

    low: Tensor
    high: Tensor
    floor: Tensor
    best: Tensor
    total: Tensor
    listed: Tensor
    number: Tensor
    mass: Tensor


def filter_floors(
    logits: Tensor,
    temperature: Tensor,
    slots: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    reach: Tensor,
) -> Floors:
    """What `serving.sampling.filters.logit_floor` returns, for rows with and without filters.

    logits: [R, V] float, rows contiguous; temperature: [R] float32, above 0 in rows with filters;
    slots: [R] int32, a row's place in top_k (int32, 0 for off, at most V), top_p (float32, 1 for
    off) and reach (float32, temperature * log(min_p), -inf for off).
    """
    tables = (top_k, top_p, reach)
    found, state, maxima = _reduce(logits, temperature, slots, tables, filters=True)
    rows, vocab = logits.shape
    if rows:
        goals = torch.empty_like(found.total)
        again = torch.empty_like(found.best)
        stride, blocks = logits.stride(0), maxima.shape[1]
        _narrow_rows[(rows,)](
            logits, temperature, slots, *tables, *state, goals, again, stride, vocab, WIDE, _LIST,
            num_warps=16,
        )  # fmt: skip
        _gather[(rows, blocks)](
            logits, maxima, again, state.high, found.count, found.values, found.ids, stride, vocab,
            blocks, BLOCK, maxima.shape[2], _LIST, False, num_warps=4,
        )  # fmt: skip
        _cut[(rows,)](
            found.values, temperature, slots, *tables, *state, goals, BLOCK, _LIST, num_warps=4
        )
    return Floors(state.floor, maxima)


def candidates(logits: Tensor, slots: Tensor, count: Tensor) -> Candidates:
    """logits: [R, V]; slots: [R] int32, a row's place in count (int32): how many of the largest
    logits its candidates must hold, 0 for none and at most V."""
    none = torch.empty(0, device=logits.device)
    found, *_ = _reduce(logits, none, slots, (count, none, none), filters=False)
    return found


def _reduce(
    logits: Tensor,
    temperature: Tensor,
    slots: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    *,
    filters: bool,
) -> tuple[Candidates, _State, Tensor]:
    rows, vocab = logits.shape
    blocks, parts = triton.cdiv(vocab, BLOCK), BLOCK // PART
    device, single = logits.device, torch.float32

    def one_each(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=device)

    maxima = torch.empty(rows, blocks, parts, dtype=single, device=device)
    sums = torch.empty(rows, blocks, dtype=single, device=device)
    state = _State(
        low=one_each(single), high=one_each(single), floor=one_each(single), best=one_each(single),
        total=one_each(torch.float64), listed=one_each(torch.int32), number=one_each(torch.int32),
        mass=one_each(torch.int64),
    )  # fmt: skip
    values = torch.empty(rows, _LIST, dtype=single, device=device)
    ids = torch.empty(0 if filters else rows, _LIST, dtype=torch.int32, device=device)
    if rows:
        stride = logits.stride(0)
        _parts[(rows, blocks)](
            logits, temperature, slots, *tables, maxima, sums, stride, vocab, blocks,
            BLOCK, PART, filters, num_warps=4,
        )  # fmt: skip
        _bound[(rows,)](
            temperature, slots, *tables, maxima, sums, *state, vocab, blocks,
            triton.next_power_of_2(blocks), parts, 2 * BLOCK, filters, num_warps=8,
        )  # fmt: skip
        _gather[(rows, blocks)](
            logits, maxima, state.low, state.high, state.listed, values, ids, stride, vocab, blocks,
            BLOCK, parts, _LIST, not filters, num_warps=4,
        )  # fmt: skip
    return Candidates(values, ids, state.listed, state.best, state.total), state, maxima
