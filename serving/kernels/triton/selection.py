# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The lowest logit that top-k, top-p and min-p keep, and the largest logits, without a sort.

`serving.sampling.filters` says what each filter keeps. Here a row's bound is found in four steps:

1. every block of the row: its mass, and the largest logit of each part of it;
2. one program a row: a bound below the answer. The k-th largest of the parts' maxima is at most the
   k-th largest logit; where the maxima alone hold the mass p, the answer is not below them; tokens
   that share less than 1 - p of the mass among all of them are never needed;
3. what is not below that bound is written to a short list, in any order;
4. one program a row: bisection over the bits of the logits, over the list, or over the whole row
   where the list is too short for it.

Counts are integers and masses are integers in fixed point, so their sums depend on no order, and a
row's result on nothing but the row and its settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Candidates", "Floors", "candidates", "filter_floors"]

BLOCK = 1024  # logits that one program reads
PART = 128  # a block's maximum is kept for each part of so many logits
_LIST = 4096  # candidates of a row that fit its list
WIDE = 8192  # logits that one program looks at together where it goes over a whole row

# Mass 1 is this; a vocabulary of 2^20 tokens cannot overflow 63 bits.
_ONE = tl.constexpr(2.0**42)
_LOWEST_KEY = tl.constexpr(-(2**31))
_HIGHEST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """The bits of float32 values as int32 in the order of the values; both zeros are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 value of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, best, scale):
    """Mass relative to the best logit's, in fixed point."""
    return (tl.exp((x - best) * scale) * _ONE).to(tl.int64)


@triton.jit
def _tally(source, count, pivot, best, scale, SIZE: tl.constexpr, MASS: tl.constexpr):
    """Of source[:count]: number (and mass) not below the pivot, the least of them, and the
    largest below it."""
    number = tl.zeros([SIZE], tl.int32)
    mass = tl.zeros([SIZE], tl.int64)
    least = tl.full([SIZE], _HIGHEST_KEY, tl.int32)
    most = tl.full([SIZE], _LOWEST_KEY, tl.int32)
    for start in range(0, count, SIZE):
        at = start + tl.arange(0, SIZE)
        inside = at < count
        x = tl.load(source + at, mask=inside, other=float("-inf")).to(tl.float32)
        key = ordered(x)
        above = (key >= pivot) & inside
        number += above.to(tl.int32)
        if MASS:
            mass += tl.where(above, _weights(x, best, scale), 0)
        least = tl.minimum(least, tl.where(above, key, _HIGHEST_KEY))
        most = tl.maximum(most, tl.where(above | (at >= count), _LOWEST_KEY, key))
    return tl.sum(number, 0), tl.sum(mass, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _search(source, count, wanted, low, high, best, scale, SIZE: tl.constexpr, MASS: tl.constexpr):
    """The largest key of source[:count] such that the values not below it are `wanted` in number
    (or in mass); `low` if all from there on are too few. The answer lies between low and high."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        number, mass, least, most = _tally(
            source, count, middle.to(tl.int32), best, scale, SIZE, MASS
        )
        enough = number >= wanted
        if MASS:
            enough = mass.to(tl.float64) >= wanted
        if enough:
            low = least.to(tl.int64)
        else:
            high = most.to(tl.int64)
    return low.to(tl.int32)


@triton.jit
def _settings(slots, row, top_k, top_p, reach, FILTERS: tl.constexpr):
    """top-k, top-p, min-p's reach below the best logit, and whether any of them is on."""
    slot = tl.load(slots + row)
    k = tl.load(top_k + slot)
    p = 1.0
    below = float("-inf")
    active = k > 0
    if FILTERS:
        p = tl.load(top_p + slot)
        below = tl.load(reach + slot)
        active = active | (p < 1.0) | (below > float("-inf"))
    return k, p, below, active


@triton.jit
def _scale(temperature, row, FILTERS: tl.constexpr):
    scale = 1.0
    if FILTERS:
        warmth = tl.load(temperature + row)
        scale = tl.where(warmth > 0, 1.0 / tl.where(warmth > 0, warmth, 1.0), 1.0)
    return scale


@triton.jit
def _parts_kernel(
    logits, temperature, slots, top_k, top_p, reach, maxima, sums, row_stride, vocab, blocks,
    SIZE: tl.constexpr, PART_SIZE: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One block of a row: the largest logit of each part, and the mass relative to the largest."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    _, _, _, active = _settings(slots, row, top_k, top_p, reach, FILTERS)
    if active == 0:
        return
    at = block * SIZE + tl.arange(0, SIZE)
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + at, mask=at < vocab, other=float("-inf")
    ).to(tl.float32)
    best = tl.max(x, 0)
    finite = tl.where(best == float("-inf"), 0.0, best)
    scale = _scale(temperature, row, FILTERS)
    tl.store(sums + row * blocks + block, tl.sum(tl.exp((x - finite) * scale), 0))
    parts: tl.constexpr = SIZE // PART_SIZE
    part_best = tl.max(tl.reshape(x, [parts, PART_SIZE]), 1)
    tl.store(maxima + (row * blocks + block) * parts + tl.arange(0, parts), part_best)


@triton.jit
def _bound_kernel(
    temperature, slots, top_k, top_p, reach, maxima, sums, lows, floors, bests, totals, counts,
    vocab, blocks,
    BLOCKS_PAD: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One row: its best logit, its mass, and `lows`, which is not above what top-k or top-p keep.

    floors gets the bound of min-p; lows is infinite where that is already the answer.
    """
    row = tl.program_id(0)
    k, p, below, active = _settings(slots, row, top_k, top_p, reach, FILTERS)
    tl.store(counts + row, 0)
    tl.store(lows + row, float("inf"))
    tl.store(floors + row, float("-inf"))
    if active == 0:
        return
    b = tl.arange(0, BLOCKS_PAD)
    c = tl.arange(0, PARTS)
    own = maxima + row * blocks * PARTS
    within = b < blocks
    block_best = tl.max(
        tl.load(own + b[:, None] * PARTS + c[None, :], mask=within[:, None], other=float("-inf")),
        1,
    )
    best = tl.max(block_best, 0)
    if best == float("-inf"):
        return
    scale = _scale(temperature, row, FILTERS)
    mass = tl.load(sums + row * blocks + b, mask=within, other=0.0)
    total = tl.sum((mass * tl.exp((block_best - best) * scale)).to(tl.float64), 0)
    tl.store(bests + row, best)
    tl.store(totals + row, total)
    number = blocks * PARTS
    low = tl.full([], float("-inf"), tl.float32)
    if k > 0:
        if k <= number:
            low = value_of(
                _search(own, number, k, ordered(low), ordered(best), best, scale, SIZE, False)
            )
        if p >= 1.0:
            # The mass within top-k counts tokens that min-p leaves out; without top-p it does not.
            low = tl.maximum(low, best + below)
    elif p < 1.0:
        # Half of the share, so that rounding cannot matter.
        share = 0.5 * (1.0 - p) * total.to(tl.float32) / vocab
        low = best + tl.log(share) / scale
        wanted = p.to(tl.float64) * total * _ONE
        low = value_of(
            _search(own, number, wanted, ordered(low), ordered(best), best, scale, SIZE, True)
        )
        low = tl.maximum(low, best + below)
    tl.store(floors + row, best + below)
    if (k > 0) | (p < 1.0):
        tl.store(lows + row, low)


@triton.jit
def _gather_kernel(
    logits, maxima, lows, counts, values, ids, row_stride, vocab, blocks,
    SIZE: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Append a block's logits that are not below the row's bound to the row's list.

    counts goes on beyond the list's room, so that it tells whether all of them are there.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    low = tl.load(lows + row)
    if low == float("inf"):
        return
    best = tl.max(tl.load(maxima + (row * blocks + block) * PARTS + tl.arange(0, PARTS)), 0)
    if best < low:
        return
    at = block * SIZE + tl.arange(0, SIZE)
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + at, mask=at < vocab, other=float("-inf")
    ).to(tl.float32)
    held = (x >= low) & (x > float("-inf"))
    taken = held.to(tl.int32)
    place = tl.atomic_add(counts + row, tl.sum(taken, 0)) + tl.cumsum(taken, 0) - taken
    held = held & (place < ROOM)
    tl.store(values + row * ROOM + place, x, mask=held)
    if IDS:
        tl.store(ids + row * ROOM + place, at, mask=held)


@triton.jit
def _bisect(
    source, count, low, k, p, best, total, scale, SIZE: tl.constexpr,
):  # fmt: skip
    """The key of the lowest logit that top-k and then top-p keep; both see only source[:count]."""
    cut = ordered(low)
    top = ordered(best)
    wanted = p.to(tl.float64) * total * _ONE
    if k > 0:
        cut = _search(source, count, k, cut, top, best, scale, SIZE, False)
        # Of the tokens that tie with the k-th only as many count as k has room for.
        number, mass, _, _ = _tally(source, count, cut + 1, best, scale, SIZE, True)
        mass += (k - number).to(tl.int64) * _weights(value_of(cut), best, scale)
        wanted = p.to(tl.float64) * mass.to(tl.float64)
    if p < 1.0:
        cut = _search(source, count, wanted, cut, top, best, scale, SIZE, True)
    return cut


@triton.jit
def _cut_kernel(
    source, temperature, slots, top_k, top_p, reach, lows, floors, bests, totals, counts,
    row_stride, vocab,
    SIZE: tl.constexpr, ROOM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One row's floor from its list, or, where the list is too short, from the WHOLE row."""
    row = tl.program_id(0)
    low = tl.load(lows + row)
    count = tl.load(counts + row)
    if low == float("inf"):
        return
    if (count > ROOM) != WHOLE:
        return
    k, p, _, _ = _settings(slots, row, top_k, top_p, reach, True)
    scale = _scale(temperature, row, True)
    if WHOLE:
        count = vocab
    cut = _bisect(
        source + row.to(tl.int64) * row_stride, count, low, k, p, tl.load(bests + row),
        tl.load(totals + row), scale, SIZE,
    )  # fmt: skip
    tl.store(floors + row, tl.maximum(tl.load(floors + row), value_of(cut)))


# The kernels carry no types of their own.
_parts: Any = _parts_kernel
_bound: Any = _bound_kernel
_gather: Any = _gather_kernel
_cut: Any = _cut_kernel


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
    found, lows, floors, maxima = _reduce(logits, temperature, slots, tables, filters=True)
    rows, vocab = logits.shape
    if rows:
        stride = logits.stride(0)
        state = (*tables, lows, floors, found.best, found.total, found.count)
        _cut[(rows,)](
            found.values, temperature, slots, *state, _LIST, vocab, BLOCK, _LIST, False,
            num_warps=4,
        )  # fmt: skip
        _cut[(rows,)](
            logits, temperature, slots, *state, stride, vocab, WIDE, _LIST, True, num_warps=16
        )
    return Floors(floors, maxima)


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
) -> tuple[Candidates, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    blocks, parts = triton.cdiv(vocab, BLOCK), BLOCK // PART
    device, single = logits.device, torch.float32
    maxima = torch.empty(rows, blocks, parts, dtype=single, device=device)
    sums = torch.empty(rows, blocks, dtype=single, device=device)
    lows = torch.empty(rows, dtype=single, device=device)
    floors, best = torch.empty_like(lows), torch.empty_like(lows)
    total = torch.empty(rows, dtype=torch.float64, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    values = torch.empty(rows, _LIST, dtype=single, device=device)
    ids = torch.empty(0 if filters else rows, _LIST, dtype=torch.int32, device=device)
    if rows:
        stride = logits.stride(0)
        _parts[(rows, blocks)](
            logits, temperature, slots, *tables, maxima, sums, stride, vocab, blocks,
            BLOCK, PART, filters, num_warps=4,
        )  # fmt: skip
        _bound[(rows,)](
            temperature, slots, *tables, maxima, sums, lows, floors, best, total, counts, vocab,
            blocks, triton.next_power_of_2(blocks), parts, BLOCK, filters, num_warps=4,
        )  # fmt: skip
        _gather[(rows, blocks)](
            logits, maxima, lows, counts, values, ids, stride, vocab, blocks,
            BLOCK, parts, _LIST, not filters, num_warps=4,
        )  # fmt: skip
    return Candidates(values, ids, counts, best, total), lows, floors, maxima
