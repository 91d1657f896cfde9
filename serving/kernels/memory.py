"""Tensors on large pages, where the system gives them.

A step walks over all weights and all keys and values in use. On pages of 4 KiB that is some
hundred thousand address translations, each of which a prefetch has to wait for.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["large_zeros"]

_PAGE = 2 << 20


def large_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros on the CPU; the memory starts at a large page and asks for more of them.

    A refusal changes nothing but speed, and tensors below one large page are ordinary ones. The
    memory becomes real as it is first written.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    area = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(area, dtype=torch.uint8)  # keeps the area alive
    start = -raw.data_ptr() % _PAGE
    with contextlib.suppress(OSError):  # a kernel without large pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return raw[start : start + size].view(dtype).view(*shape)
