"""Token ids to hidden rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serving.layers.place import Place
from serving.weights.slots import WeightSlot

__all__ = ["Embedding"]


class Embedding:
    """A table of one row a token, for stages that do not hold it as a head already."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, place: Place) -> None:
        self._name, self._size = name, (vocab_size, hidden_size)
        self._place = place
        self._table = torch.empty(0, dtype=place.dtype, device=place.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensor this layer wants, by name."""
        return {f"{self._name}.weight": self._size}

    def slots(self) -> list[WeightSlot]:
        """Allocate the table."""
        self._table = torch.empty(self._size, dtype=self._place.dtype, device=self._place.device)
        return [WeightSlot(f"{self._name}.weight", self._table)]

    def ready(self) -> None:
        """The table is used as it was loaded."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64 -> [T, hidden]."""
        return functional.embedding(token_ids, self._table)
