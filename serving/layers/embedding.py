"""Token ids to hidden rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from serving.layers.place import Place
from serving.layers.share import VocabularyShare, vocabulary_share
from serving.weights.slots import Region, WeightSlot

if TYPE_CHECKING:
    from serving.transport.tensor_group import TensorGroup

__all__ = ["Embedding", "looked_up"]


class Embedding:
    """A table of one row a token, for stages that do not hold it as a head already.

    A rank of a tensor-parallel stage holds the rows of a part of the vocabulary.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, place: Place) -> None:
        self._name, self._hidden = f"{name}.weight", hidden_size
        self._place = place
        self._share = vocabulary_share(vocab_size, place)
        self._table = torch.empty(0, dtype=place.dtype, device=place.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensor this layer wants, by name."""
        return {self._name: (self._share.size, self._hidden)}

    def regions(self) -> dict[str, Region]:
        """What this rank holds of it, where it is not alone."""
        if self._place.ranks == 1:
            return {}
        return {self._name: (self._share.tokens, range(self._hidden))}

    def slots(self) -> list[WeightSlot]:
        """Allocate the table."""
        size = (self._share.rows, self._hidden)
        self._table = torch.empty(size, dtype=self._place.dtype, device=self._place.device)
        held = len(self._share.tokens)
        self._table[held:].zero_()
        region = self.regions().get(self._name)
        shape = self.shapes()[self._name]
        return [WeightSlot(self._name, self._table[:held], region=region, shape=shape)]

    def ready(self) -> None:
        """The table is used as it was loaded."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64 -> [T, hidden]."""
        return looked_up(token_ids, self._rows, self._share, self._place.group)

    def _rows(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self._table)


def looked_up(
    token_ids: Tensor,
    rows_of: Callable[[Tensor], Tensor],
    share: VocabularyShare,
    group: TensorGroup | None,
) -> Tensor:
    """Rows of a table that is shared out by tokens: each comes from the one rank that holds it.

    token_ids: [T] integers; rows_of gives rows [T, H] of this rank's part, counted from its start.
    """
    if group is None:
        return rows_of(token_ids)
    local = token_ids - share.tokens.start
    elsewhere = (local < 0) | (local >= len(share.tokens))
    rows = rows_of(local.masked_fill(elsewhere, 0))
    rows.masked_fill_(elsewhere.unsqueeze(1), 0.0)
    group.all_reduce(rows)
    return rows
