"""What a layer wants loaded: named places in its own weights, filled tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Fill", "WeightSlot"]

Fill = Literal["random", "ones"]


@dataclass(frozen=True)
class WeightSlot:
    """One tensor of a checkpoint and the place in a layer's weight where it belongs.

    `into` is a view, so the parts of a fused weight (q, k and v; gate and up) each have a slot
    in one tensor. A layer that holds only a share of a weight would narrow what it is given
    before the copy; today every layer holds the whole. `fill` says what dummy loading writes.
    """

    name: str
    into: Tensor
    fill: Fill = "random"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape the checkpoint's tensor must have."""
        return tuple(self.into.shape)

    def load(self, tensor: Tensor) -> None:
        """Copy the checkpoint's tensor in, converting dtype and device."""
        self.into.copy_(tensor)
