"""Random weights from a seed: the same for a tensor whatever stage, order or device holds it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from serving.weights.slots import WeightSlot

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
        flat = slot.into.view(-1)
        for start in range(0, flat.numel(), _POOL):
            part: Tensor = flat[start : start + _POOL]
            part.copy_(self._pool[offset : offset + part.numel()])
