"""Random weights from a seed: the same for a tensor whatever stage, rank or device holds it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from serving.weights.slots import Region, WeightSlot

__all__ = ["DummyWeights"]

# A prime, so that rows of any usual width start at different places of the pool.
_POOL = 1_048_583
_SCALE = 0.02


class DummyWeights:
    """Fills slots from one pool of normal numbers, at an offset that the tensor's name gives.

    Reading a pool again and again costs a copy, where drawing billions of numbers would take
    minutes. No value is zero, and no two rows of a matrix are alike (fewer than 2^20 rows) for
    widths that the prime pool length does not divide.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
        numbers = torch.randn(_POOL, generator=generator) * _SCALE
        numbers[numbers == 0] = _SCALE
        self._pool = numbers.to(device).repeat(2)

    def fill(self, slot: WeightSlot) -> None:
        """Write a slot: ones for norm weights, random numbers otherwise."""
        if slot.fill == "ones":
            slot.into.fill_(1.0)
            return
        digest = hashlib.blake2b(f"{self._seed}/{slot.name}".encode(), digest_size=8).digest()
        offset = int.from_bytes(digest, "little") % _POOL
        if slot.region is not None:
            self._fill_region(slot.into, slot.region, slot.shape, offset)
            return
        flat = slot.into.view(-1)
        for start in range(0, flat.numel(), _POOL):
            part: Tensor = flat[start : start + _POOL]
            part.copy_(self._pool[offset : offset + part.numel()])

    def _fill_region(
        self, into: Tensor, region: Region, shape: tuple[int, ...], offset: int
    ) -> None:
        """The numbers that the whole tensor has there: element i of it is number offset + i of the
        pool, read round and round."""
        width = shape[-1]
        columns = region[-1]
        rows = region[0] if len(region) > 1 else range(1)
        held = into.view(len(rows), len(columns))
        # Rows of one copy, so that the last of them still ends within the two pools.
        count = max(1, (_POOL - len(columns)) // width + 1)
        for start in range(0, len(rows), count):
            part = held[start : start + count]
            first = (offset + (rows.start + start) * width + columns.start) % _POOL
            part.copy_(self._pool.as_strided(part.shape, (width, 1), first))
