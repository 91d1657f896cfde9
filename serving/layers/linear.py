"""Linear layers: one product for all checkpoint matrices that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from serving import kernels
from serving.layers.place import Place
from serving.weights.slots import WeightSlot

__all__ = ["Linear"]

Split = Literal["column", "row"]


class Linear:
    """`y = x @ W.T + b`, with W the parts' weights on top of each other.

    parts: (name in the checkpoint without `.weight`, output features) each. `split` says along
    which side ranks of a tensor-parallel group would share the weight: "column" shares outputs
    (each part by itself), "row" shares inputs.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        *,
        bias: bool,
        split: Split,
        place: Place,
    ) -> None:
        self.parts = tuple(parts)
        self.in_features, self.out_features = in_features, sum(size for _, size in parts)
        self.split = split
        self._bias, self._place = bias, place
        self._raw: tuple[Tensor, Tensor | None] | None = None
        self._packed: kernels.PackedLinear | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors this layer wants, by name."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, size in self.parts:
            wanted[f"{name}.weight"] = (size, self.in_features)
            if self._bias:
                wanted[f"{name}.bias"] = (size,)
        return wanted

    def slots(self) -> list[WeightSlot]:
        """Allocate weight and bias; one slot for each part's share."""
        dtype, device = self._place.dtype, self._place.device
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        bias = torch.empty(self.out_features, dtype=dtype, device=device) if self._bias else None
        self._raw = (weight, bias)
        slots: list[WeightSlot] = []
        start = 0
        for name, size in self.parts:
            slots.append(WeightSlot(f"{name}.weight", weight[start : start + size]))
            if bias is not None:
                slots.append(WeightSlot(f"{name}.bias", bias[start : start + size]))
            start += size
        return slots

    def ready(self) -> None:
        """Pack the filled weight for this machine; the unpacked copy is dropped."""
        if self._raw is None:
            raise RuntimeError("slots() must be called and filled before ready()")
        self._packed = kernels.pack_linear(*self._raw)
        self._raw = None

    @property
    def packed(self) -> kernels.PackedLinear:
        """The loaded weight."""
        if self._packed is None:
            raise RuntimeError(f"the weight of {self.parts[0][0]} is not loaded yet")
        return self._packed

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, in_features] -> [M, out_features]."""
        return self.packed(x)
