"""Root-mean-square norms."""

from __future__ import annotations

import torch
from torch import Tensor

from serving import kernels
from serving.layers.place import Place
from serving.weights.slots import Region, WeightSlot

__all__ = ["RMSNorm"]


class RMSNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`; the mean is in float32."""

    def __init__(self, name: str, size: int, eps: float, place: Place) -> None:
        self._name, self._size, self.eps = name, size, eps
        self._place = place
        self.weight = torch.empty(0, dtype=place.dtype, device=place.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensor this norm wants, by name."""
        return {f"{self._name}.weight": (self._size,)}

    def regions(self) -> dict[str, Region]:
        """Every rank holds the whole."""
        return {}

    def slots(self) -> list[WeightSlot]:
        """Allocate the weight."""
        self.weight = torch.empty(self._size, dtype=self._place.dtype, device=self._place.device)
        return [WeightSlot(f"{self._name}.weight", self.weight, fill="ones")]

    def ready(self) -> None:
        """The weight is used as it was loaded."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`total = x + residual`, rounded to the dtype first; returns (norm of total, total)."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)
