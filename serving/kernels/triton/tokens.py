# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Sampled tokens that come from another device enter the tokens that this one keeps by slot."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["keep_tokens"]

_ROWS = 256


@triton.jit(do_not_specialize=["count"])
def _keep_kernel(slots, tokens, last_tokens, count, ROWS: tl.constexpr):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = at < count
    slot = tl.load(slots + at, mask=mask, other=0)
    token = tl.load(tokens + at, mask=mask, other=0)
    tl.store(last_tokens + slot, token, mask=mask)


# The kernel carries no types of its own.
_keep: Any = _keep_kernel


def keep_tokens(slots: Tensor, tokens: Tensor, last_tokens: Tensor) -> None:
    """`last_tokens[slots[i]] = tokens[i]`; slots and tokens [R] int32, slots distinct."""
    count = slots.shape[0]
    if count:
        _keep[(triton.cdiv(count, _ROWS),)](slots, tokens, last_tokens, count, _ROWS, num_warps=4)
