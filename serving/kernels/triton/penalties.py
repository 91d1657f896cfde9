# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Penalties over the tokens that a sequence has seen, and bans, in place on the device.

The table of a penalised sequence is that of `serving.sampling.penalties`: the first `lengths[t]`
entries of `ids[t]` are distinct tokens, `counts[t]` how often each is in the output.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ban_tokens", "count_tokens", "penalize"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["width"])
def _apply_kernel(
    logits, at, entries, lengths, ids, counts, factors, row_stride, width, SIZE: tl.constexpr,
):  # fmt: skip
    """One block of one sequence's tokens."""
    p = tl.program_id(0)
    entry = tl.load(entries + p).to(tl.int64)
    place = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    held = place < tl.load(lengths + entry)
    token = tl.load(ids + entry * width + place, mask=held, other=0)
    count = tl.load(counts + entry * width + place, mask=held, other=0.0)
    repetition = tl.load(factors + entry * 3)
    presence = tl.load(factors + entry * 3 + 1)
    frequency = tl.load(factors + entry * 3 + 2)
    to = logits + tl.load(at + p).to(tl.int64) * row_stride + token
    x = tl.load(to, mask=held, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = x - frequency * count - tl.where(count > 0, presence, 0.0)
    tl.store(to, x, mask=held)


@triton.jit(do_not_specialize=["width"])
def _count_kernel(
    tokens, at, entries, lengths, ids, counts, width, SIZE: tl.constexpr,
):  # fmt: skip
    """One sequence's new token: one more of it, or a new entry."""
    p = tl.program_id(0)
    entry = tl.load(entries + p).to(tl.int64)
    token = tl.load(tokens + tl.load(at + p))
    length = tl.load(lengths + entry)
    known = tl.full([SIZE], -1, tl.int32)
    for start in range(0, length.to(tl.int32), SIZE):
        place = start + tl.arange(0, SIZE)
        held = tl.load(ids + entry * width + place, mask=place < length, other=-1)
        known = tl.maximum(known, tl.where(held == token, place, -1))
    found = tl.max(known, 0)
    own = counts + entry * width
    if found >= 0:
        tl.store(own + found, tl.load(own + found) + 1.0)
    else:
        tl.store(ids + entry * width + length, token.to(tl.int64))
        tl.store(own + length, 1.0)
        tl.store(lengths + entry, length + 1)


@triton.jit(do_not_specialize=["count"])
def _ban_kernel(logits, rows, banned, row_stride, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < count
    row = tl.load(rows + at, mask=mask, other=0).to(tl.int64)
    token = tl.load(banned + at, mask=mask, other=0)
    tl.store(logits + row * row_stride + token, float("-inf"), mask=mask)


# The kernels carry no types of their own.
_apply: Any = _apply_kernel
_count: Any = _count_kernel
_ban: Any = _ban_kernel


def penalize(
    logits: Tensor,
    at: Tensor,
    entries: Tensor,
    lengths: Tensor,
    ids: Tensor,
    counts: Tensor,
    factors: Tensor,
    longest: int,
) -> None:
    """Rows `at` [P] of logits [R, V] float32 for the sequences `entries` [P], both int32.

    lengths: [T] int64; ids: [T, W] int64; counts: [T, W] float32; factors: [T, 3] float32,
    repetition, presence and frequency; longest: no sequence here has more tokens.
    """
    if at.shape[0] and longest:
        _apply[(at.shape[0], triton.cdiv(longest, _BLOCK))](
            logits, at, entries, lengths, ids, counts, factors, logits.stride(0), ids.stride(0),
            _BLOCK, num_warps=4,
        )  # fmt: skip


def count_tokens(
    tokens: Tensor, at: Tensor, entries: Tensor, lengths: Tensor, ids: Tensor, counts: Tensor
) -> None:
    """Enter token `tokens[at[p]]` (int32) for distinct sequences `entries`; ids has room."""
    if at.shape[0]:
        _count[(at.shape[0],)](
            tokens, at, entries, lengths, ids, counts, ids.stride(0), _BLOCK, num_warps=4
        )


def ban_tokens(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """`logits[rows[i], tokens[i]] = -inf`; rows and tokens: [N] int32."""
    if rows.shape[0]:
        _ban[(triton.cdiv(rows.shape[0], 256),)](
            logits, rows, tokens, logits.stride(0), rows.shape[0], 256, num_warps=4
        )
