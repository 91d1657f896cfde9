"""Linear layers: one product for all checkpoint matrices that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from serving import kernels
from serving.layers.place import Place
from serving.layers.share import share, vocabulary_share
from serving.weights.slots import Region, WeightSlot

__all__ = ["Linear"]

Split = Literal["column", "row", "vocabulary"]


class Linear:
    """`y = x @ W.T + b`, with W the parts' weights on top of each other.

    parts: (name in the checkpoint without `.weight`, output features) each. `split` says along
    which side the ranks of a tensor-parallel stage share the weight: "column" shares outputs (each
    part by itself, in runs of `unit`), "row" shares inputs, and the product is summed over the
    ranks; "vocabulary" shares outputs in parts of equal size, with outputs of 0 where a rank has
    more room than tokens. Sizes given are those of the whole, `in_features` and `out_features`
    those of this rank.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        *,
        bias: bool,
        split: Split,
        place: Place,
        unit: int = 1,
    ) -> None:
        self.parts = tuple(parts)
        self.split = split
        self._whole_in, self._place = in_features, place
        self._columns = share(in_features, place, unit) if split == "row" else range(in_features)
        self._rows = [self._share(size, unit) for _, size in parts]
        self.in_features = len(self._columns)
        self.out_features = sum(map(len, self._rows))
        if split == "vocabulary":
            self.out_features = vocabulary_share(parts[0][1], place).rows
        # Of a sum over ranks only one may bring the bias.
        self._bias = bias and (split != "row" or place.rank == 0)
        self._sum_over = place.group if split == "row" else None
        self._raw: tuple[Tensor, Tensor | None] | None = None
        self._packed: kernels.PackedLinear | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors this layer wants, by name."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, size in self.parts:
            wanted[f"{name}.weight"] = (size, self._whole_in)
            if self._bias:
                wanted[f"{name}.bias"] = (size,)
        return wanted

    def regions(self) -> dict[str, Region]:
        """What this rank holds of them, where it is not alone."""
        if self._place.ranks == 1:
            return {}
        held: dict[str, Region] = {}
        for (name, _), rows in zip(self.parts, self._rows, strict=True):
            held[f"{name}.weight"] = (rows, self._columns)
            if self._bias:
                held[f"{name}.bias"] = (rows,)
        return held

    def slots(self) -> list[WeightSlot]:
        """Allocate weight and bias; one slot for each part's share."""
        dtype, device = self._place.dtype, self._place.device
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        bias = torch.empty(self.out_features, dtype=dtype, device=device) if self._bias else None
        self._raw = (weight, bias)
        shapes, regions = self.shapes(), self.regions()
        slots: list[WeightSlot] = []
        start = 0
        for (part, _), rows in zip(self.parts, self._rows, strict=True):
            for name, whole in ((f"{part}.weight", weight), (f"{part}.bias", bias)):
                if whole is not None:
                    into = whole[start : start + len(rows)]
                    region = regions.get(name)
                    slots.append(WeightSlot(name, into, region=region, shape=shapes[name]))
            start += len(rows)
        weight[start:].zero_()
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
        product = self.packed(x)
        if self._sum_over is not None:
            self._sum_over.all_reduce(product)
        return product

    def _share(self, size: int, unit: int) -> range:
        if self.split == "row":
            return range(size)
        if self.split == "vocabulary":
            return vocabulary_share(size, self._place).tokens
        return share(size, self._place, unit)
