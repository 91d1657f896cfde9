# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Log probabilities of drawn tokens and of the most likely ones, on the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.kernels.triton.selection import BLOCK, WIDE, candidates
from serving.kernels.triton.selection_kernels import ordered, value_of

__all__ = ["token_logprobs"]

_NONE = tl.constexpr(-(2**63) + 1)
_BEFORE_ALL = tl.constexpr(2**63 - 1)
_LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["width"])
def _top_kernel(
    source, ids, logits, tokens, slots, alternatives, counts, bests, totals, logprobs, top_ids,
    top_logprobs, source_stride, row_stride, vocab, width,
    SIZE: tl.constexpr, ROOM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One row: its `width` best tokens from its list of candidates, or from the WHOLE row.

    A logit's key and its token make one number, the lower token the larger one, so that equal
    logits have an order; each turn finds the largest number below the one before.
    """
    row = tl.program_id(0)
    asked = tl.load(alternatives + tl.load(slots + row)) > 0
    count = tl.load(counts + row)
    if ((count > ROOM) & asked) != WHOLE:
        return
    if asked == 0:
        tl.store(logprobs + row, 0.0)
        for n in range(0, width):
            tl.store(top_ids + row * width + n, 0)
            tl.store(top_logprobs + row * width + n, 0.0)
        return
    own = source + row.to(tl.int64) * source_stride
    if WHOLE:
        count = vocab
    best = tl.load(bests + row)
    spread = tl.log(tl.load(totals + row).to(tl.float32))
    chosen = tl.load(logits + row.to(tl.int64) * row_stride + tl.load(tokens + row))
    tl.store(logprobs + row, chosen.to(tl.float32) - best - spread)
    before = tl.full([], _BEFORE_ALL, tl.int64)
    for n in range(0, width):
        largest = tl.full([SIZE], _NONE, tl.int64)
        for start in range(0, count, SIZE):
            at = start + tl.arange(0, SIZE)
            inside = at < count
            x = tl.load(own + at, mask=inside, other=float("-inf")).to(tl.float32)
            token = at
            if WHOLE == 0:
                token = tl.load(ids + row * ROOM + at, mask=inside, other=0)
            number = (ordered(x).to(tl.int64) << 32) + (_LAST_ID - token)
            largest = tl.maximum(largest, tl.where(inside & (number < before), number, _NONE))
        before = tl.max(largest, 0)
        found = before > _NONE
        token = tl.where(found, _LAST_ID - (before & 0xFFFFFFFF), 0)
        value = tl.where(found, value_of((before >> 32).to(tl.int32)), float("-inf"))
        tl.store(top_ids + row * width + n, token.to(tl.int32))
        tl.store(top_logprobs + row * width + n, value - best - spread)


# The kernel carries no types of its own.
_top: Any = _top_kernel


def token_logprobs(
    logits: Tensor, tokens: Tensor, slots: Tensor, alternatives: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens [R] int32: their log probabilities [R] float32, and the `width` most likely
    tokens with theirs, [R, width] int32 and float32, best first, the lower of equal ones first.

    logits: [R, V]; slots: [R] int32, a row's place in alternatives (int32): 0 for a row that did
    not ask and gets zeros, else a number from max(1, width) to V, the same whatever a row and its
    neighbours asked for. Fewer tokens with mass than width leave log probabilities of -inf.
    """
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    top_ids = torch.empty(rows, width, dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    if rows:
        found = candidates(logits, slots, alternatives)
        stride = logits.stride(0)
        common = (
            logits, tokens, slots, alternatives, found.count, found.best, found.total, logprobs,
            top_ids, top_logprobs,
        )  # fmt: skip
        _top[(rows,)](
            found.values, found.ids, *common, found.room, stride, vocab, width,
            BLOCK, found.room, False, num_warps=4,
        )  # fmt: skip
        _top[(rows,)](
            logits, found.ids, *common, stride, stride, vocab, width,
            WIDE, found.room, True, num_warps=16,
        )  # fmt: skip
    return logprobs, top_ids, top_logprobs
