"""How KV of a layer gets from one stage's memory into another's.

Pages have the same numbers on all stages, so what is read in one place is written in the same place
of the other stage's tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.transport.layers import LayerLinks

__all__ = ["Index", "KvCopies", "LinkedCopies", "Pages", "Place", "Tokens"]

_CHUNK = 4 << 20  # bytes of KV in one message


@dataclass(frozen=True)
class Pages:
    """Whole pages of a layer's KV: [n] int64."""

    pages: Tensor


@dataclass(frozen=True)
class Tokens:
    """Token `offsets[i]` of page `pages[i]`, [n] int64 each."""

    pages: Tensor
    offsets: Tensor


Place = Pages | Tokens
#: Of pages, or of tokens in pages, in a layer's KV.
Index = tuple[Tensor] | tuple[Tensor, slice, Tensor]


class KvCopies(ABC):
    """Copies of one stage. `kv` has a tensor [pages, 2, page_size, kv_heads, head_dim] for each
    layer that the stage may own. One thread may send while another one receives; what is sent and
    what is received between two stages is the same, in the same order.
    """

    def __init__(self, kv: Mapping[int, Tensor]) -> None:
        self.kv = kv
        self.num_pages, _, self.page_size = next(iter(kv.values())).shape[:3]

    def mark(self) -> object:
        """All work on KV that this stage has begun by now; called on the thread that begins it."""
        return None

    @abstractmethod
    def send(self, layer: int, place: Place, stage: int, since: object) -> None:
        """Give `stage` what the place holds once all work up to the mark `since` is done. It may be
        newer than that."""

    @abstractmethod
    def receive(self, layer: int, place: Place, stage: int) -> None:
        """Take it from `stage`; returns when it is there."""


class LinkedCopies(KvCopies):
    """As messages. A stage computes on the host, at once, so marks say nothing."""

    def __init__(self, kv: Mapping[int, Tensor], links: LayerLinks) -> None:
        super().__init__(kv)
        self._links = links

    def send(self, layer: int, place: Place, stage: int, since: object) -> None:
        for index in self._parts(place):
            self._links.send(self._read(self.kv[layer], index, since), stage)

    def receive(self, layer: int, place: Place, stage: int) -> None:
        kv = self.kv[layer]
        _, both, _, *row = kv.shape
        shape = kv.shape[1:] if isinstance(place, Pages) else (both, *row)
        for index in self._parts(place):
            rows = torch.empty((len(index[0]), *shape), dtype=kv.dtype)
            self._links.receive(rows, stage)
            self._write(kv, index, rows)

    def _parts(self, place: Place) -> list[Index]:
        """Indices into a layer's KV, each of a message."""
        if isinstance(place, Tokens):
            return [(place.pages, slice(None), place.offsets)]
        kv = next(iter(self.kv.values()))
        most = max(1, _CHUNK // (kv[0].numel() * kv.itemsize))
        return [(pages,) for pages in torch.split(place.pages, most)]

    def _read(self, kv: Tensor, index: Index, since: object) -> Tensor:
        return kv[index].contiguous()

    def _write(self, kv: Tensor, index: Index, rows: Tensor) -> None:
        kv[index] = rows
