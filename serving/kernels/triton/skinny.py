"""Products of few rows: block sizes, shares of k, launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serving.kernels.triton import skinny_kernels

__all__ = ["MOST_ROWS", "SkinnyShape", "skinny_linear", "skinny_shape"]

# The kernel carries no types of its own.
_kernels: Any = skinny_kernels

#: More rows than these are multiplied as fast by the vendor's library.
MOST_ROWS = 32

_PARTS = 1 << 20  # float32 values
_BLOCKS = 4096
_ENOUGH = 120  # programs: about one a multiprocessor keeps the memory busy


@dataclass(frozen=True)
class SkinnyShape:
    """Rows a tile, columns and k a block, shares of k, warps and pipeline stages."""

    tile: int
    columns: int
    width: int
    split: int
    warps: int
    stages: int


def skinny_shape(rows: int, columns: int) -> SkinnyShape:
    """The fastest of the measured blocks for `rows` <= MOST_ROWS and a weight of `columns` rows."""
    tile = 16 if rows <= 16 else 32
    if columns >= 1 << 14:
        return SkinnyShape(tile, 128, 128 if tile == 16 else 64, 1, 4, 3 if tile == 16 else 4)
    split = 1
    while -(-columns // 64) * split < _ENOUGH and split < 8:
        split *= 2
    return SkinnyShape(tile, 64, 128, split, 4, 4)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight [N, K] transposed + bias [N], M <= MOST_ROWS; returns [M, N].

    Products of one device share their scratch memory: launch them on one stream.
    """
    rows, width = x.shape
    columns = weight.shape[0]
    shape = skinny_shape(rows, columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    parts, arrived = _scratch(x.device)
    part = shape.width * shape.split
    _kernels.skinny_kernel[(-(-columns // shape.columns) * shape.split,)](
        x, weight, weight if bias is None else bias, out, parts, arrived, rows, columns, width,
        -(-width // part), x.stride(0), out.stride(0),
        shape.tile, shape.columns, shape.width, shape.split, width % part == 0, bias is not None,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out


@functools.cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the parts of split products, and a counter for each block of columns, all zero.

    With fewer than 1 << 14 columns there are at most 256 blocks of 64; a split one has at most
    twice the programs that are enough, each with 64 columns of 32 rows.
    """
    parts = torch.empty(_PARTS, dtype=torch.float32, device=device)
    return parts, torch.zeros(_BLOCKS, dtype=torch.int32, device=device)
