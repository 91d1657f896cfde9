"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from serving import kernels
from serving.layers.linear import Linear
from serving.layers.place import Place

__all__ = ["GatedMLP"]


class GatedMLP:
    """`down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self, name: str, hidden_size: int, intermediate_size: int, *, bias: bool, place: Place
    ) -> None:
        # Each rank has a part of the width between the two products.
        parts = [(f"{name}.gate_proj", intermediate_size), (f"{name}.up_proj", intermediate_size)]
        self.gate_up = Linear(parts, hidden_size, bias=bias, split="column", place=place)
        self.down = Linear(
            [(f"{name}.down_proj", hidden_size)],
            intermediate_size,
            bias=bias,
            split="row",
            place=place,
        )
        self.leaves: list[Linear] = [self.gate_up, self.down]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self.down(kernels.silu_and_mul(self.gate_up(x)))
