"""What a layer wants loaded: named places in its own weights, filled tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Fill", "Region", "WeightSlot"]

Fill = Literal["random", "ones"]
#: The part of a tensor that a rank of a tensor-parallel stage holds: one range a dimension.
Region = tuple[range, ...]


@dataclass(frozen=True)
class WeightSlot:
    """One tensor of a checkpoint and the place in a layer's weight where it belongs.

    `into` is a view, so the parts of a fused weight (q, k and v; gate and up) each have a slot
    in one tensor. `region` is the part of the checkpoint's tensor, of shape `shape`, that goes
    there; None is all of it. `fill` says what dummy loading writes.
    """

    name: str
    into: Tensor
    fill: Fill = "random"
    region: Region | None = None
    shape: tuple[int, ...] = ()

    def load(self, tensor: Tensor) -> None:
        """Copy the checkpoint's tensor, or its region, in, converting dtype and device."""
        self.into.copy_(tensor)
