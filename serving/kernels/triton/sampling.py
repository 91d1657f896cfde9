# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""From logits to tokens in one reading of them; tokens and pages that live on the device only.

A row's token is the first whose cumulative mass exceeds u times the row's whole mass, in the order
of the vocabulary, as in `serving.sampling.draw`; temperature 0 takes the first largest logit. A row
with filters keeps only logits that are not below its floor (`selection.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.triton.selection import BLOCK, Floors

__all__ = ["draw_tokens", "enter_pages", "resolve_tokens"]


@triton.jit
def _block_kernel(
    logits, temperature, floors, part_maxima, maxima, sums, row_stride, vocab, blocks,
    SIZE: tl.constexpr, PARTS: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Largest logit of one block of a row, and the block's mass relative to it."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    if FLOOR:
        floor = tl.load(floors + row)
        part = tl.arange(0, PARTS)
        if tl.max(tl.load(part_maxima + (row * blocks + block) * PARTS + part), 0) < floor:
            tl.store(maxima + row * blocks + block, float("-inf"))
            tl.store(sums + row * blocks + block, 0.0)
            return
    at = block * SIZE + tl.arange(0, SIZE)
    warmth = tl.load(temperature + row)
    scale = tl.where(warmth > 0, 1.0 / tl.where(warmth > 0, warmth, 1.0), 1.0)
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + at, mask=at < vocab, other=float("-inf")
    ).to(tl.float32)
    if FLOOR:
        x = tl.where(x >= floor, x, float("-inf"))
    best = tl.max(x, 0)
    finite = tl.where(best == float("-inf"), 0.0, best)
    tl.store(maxima + row * blocks + block, best)
    tl.store(sums + row * blocks + block, tl.sum(tl.exp((x - finite) * scale), 0))


@triton.jit
def _choose_kernel(
    logits, temperature, uniform, floors, maxima, sums, slots, last_tokens, out, row_stride, vocab,
    blocks, SIZE: tl.constexpr, BLOCKS_PAD: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """One row: the block in which u falls, then the token inside it; never one without mass."""
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS_PAD)
    within = b < blocks
    warmth = tl.load(temperature + row)
    scale = tl.where(warmth > 0, 1.0 / tl.where(warmth > 0, warmth, 1.0), 1.0)
    block_best = tl.load(maxima + row * blocks + b, mask=within, other=float("-inf"))
    best = tl.max(block_best, 0)
    mass = tl.load(sums + row * blocks + b, mask=within, other=0.0)
    mass = mass * tl.exp((block_best - best) * scale)
    wide = mass.to(tl.float64)
    ends = tl.cumsum(wide, 0)
    target = tl.load(uniform + row) * tl.sum(wide, 0)
    # Rounding can put the target at the very end; the last block with mass is meant then.
    last_block = tl.max(tl.where(mass > 0, b, 0), 0)
    first = tl.min(tl.where((ends > target) & (mass > 0), b, BLOCKS_PAD), 0)
    drawn = tl.minimum(first, last_block)
    greedy = tl.min(tl.where(block_best == best, b, BLOCKS_PAD), 0)
    block = tl.where(warmth > 0, drawn, greedy)
    before = tl.sum(tl.where(b < block, wide, 0.0), 0)
    at = tl.arange(0, SIZE)
    token = block * SIZE + at
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + token, mask=token < vocab, other=float("-inf")
    ).to(tl.float32)
    if FLOOR:
        x = tl.where(x >= tl.load(floors + row), x, float("-inf"))
    part = tl.exp((x - best) * scale)
    inside = tl.cumsum(part.to(tl.float64), 0)
    last = tl.max(tl.where(part > 0, at, 0), 0)
    first_above = tl.min(tl.where((inside > target - before) & (part > 0), at, SIZE), 0)
    offset = tl.minimum(first_above, last)
    first_best = tl.min(tl.where(x == tl.max(x, 0), at, SIZE), 0)
    # Logits that are not numbers must not lead out of the vocabulary.
    chosen = tl.minimum(block * SIZE + tl.where(warmth > 0, offset, first_best), vocab - 1)
    tl.store(out + row, chosen)
    tl.store(last_tokens + tl.load(slots + row), chosen)


@triton.jit(do_not_specialize=["count"])
def _enter_kernel(entries, tables, table_stride, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < count
    slot = tl.load(entries + at, mask=mask, other=0).to(tl.int64)
    column = tl.load(entries + count + at, mask=mask, other=0)
    page = tl.load(entries + 2 * count + at, mask=mask, other=0)
    tl.store(tables + slot * table_stride + column, page, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _resolve_kernel(ids, last_tokens, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < count
    given = tl.load(ids + at, mask=mask, other=0)
    sampled = tl.load(last_tokens + (-1 - given), mask=mask & (given < 0), other=0)
    tl.store(out + at, tl.where(given < 0, sampled, given).to(tl.int64), mask=mask)


# The kernels carry no types of their own.
_blocks: Any = _block_kernel
_choose: Any = _choose_kernel
_resolve: Any = _resolve_kernel
_enter: Any = _enter_kernel


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    slots: Tensor,
    last_tokens: Tensor,
    out: Tensor,
    floors: Floors | None = None,
) -> None:
    """One token a row into `out` [R] int32, and into `last_tokens` at the row's slot.

    logits: [R, V] of any float dtype, not all -inf in a row; temperature: [R] float32, 0 for the
    largest; uniform: [R] float64 in (0, 1); slots: [R] int32; last_tokens: [slots] int32; floors:
    what `filter_floors` found for these logits. A row without filters gets the same token with
    floors and without.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    blocks = triton.cdiv(vocab, BLOCK)
    maxima = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    stride = logits.stride(0)
    filtered = floors is not None
    floor, parts = (temperature, maxima) if floors is None else (floors.floor, floors.maxima)
    _blocks[(rows, blocks)](
        logits, temperature, floor, parts, maxima, sums, stride, vocab, blocks,
        BLOCK, parts.shape[-1] if filtered else 1, filtered, num_warps=4,
    )  # fmt: skip
    _choose[(rows,)](
        logits, temperature, uniform, floor, maxima, sums, slots, last_tokens, out, stride, vocab,
        blocks, BLOCK, triton.next_power_of_2(blocks), filtered, num_warps=4,
    )  # fmt: skip


def resolve_tokens(ids: Tensor, last_tokens: Tensor) -> Tensor:
    """ids [T] int32: a token, or -1 - slot for the token sampled last for a slot -> [T] int64."""
    out = torch.empty(ids.shape[0], dtype=torch.int64, device=ids.device)
    if ids.shape[0]:
        _resolve[(triton.cdiv(ids.shape[0], 256),)](
            ids, last_tokens, out, ids.shape[0], 256, num_warps=4
        )
    return out


def enter_pages(entries: Tensor, tables: Tensor) -> None:
    """`tables[slots[i], columns[i]] = pages[i]`; entries [3, N] int32 holds the three, distinct."""
    count = entries.shape[1]
    if count:
        _enter[(triton.cdiv(count, 256),)](
            entries, tables, tables.stride(0), count, 256, num_warps=4
        )
