# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rows of a tensor go to the same places of another one, which another process may own."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["push_rows"]

#: Few programs: the links between GPUs are soon full, and decodes run beside this.
_PROGRAMS = 32
_BLOCK = 4096


@triton.jit(do_not_specialize=["address", "count"])
def _push_kernel(
    source, address, starts, count, LENGTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    target = address.to(tl.int64).to(tl.pointer_type(source.dtype.element_ty))
    target = tl.multiple_of(target, 16)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        start = tl.multiple_of(tl.load(starts + row), EVEN)
        for at in range(0, LENGTH, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            mask = columns < LENGTH
            values = tl.load(source + start + columns, mask=mask)
            tl.store(target + start + columns, values, mask=mask)


# The kernel carries no types of its own.
_push: Any = _push_kernel


def push_rows(source: Tensor, address: int, starts: Tensor, length: int) -> None:
    """Copy `length` elements from each of `starts` [n] int64 on, counted in elements, to the same
    places behind `address`, which is mapped here and begins like `source`.

    Starts are multiples of `length`; `address` is one of 16.
    """
    count = starts.shape[0]
    if count:
        block = min(_BLOCK, triton.next_power_of_2(length))
        even = length & -length  # the greatest power of two that divides it
        grid = (min(count, _PROGRAMS),)
        _push[grid](source, address, starts, count, length, block, even, num_warps=8)
