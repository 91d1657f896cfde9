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

from serving.errors import EngineDeadError
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

    @abstractmethod
    def begin(self, layer: int, place: Place, stage: int) -> object:
        """On the thread that computes: `stage` is to get what the place holds when all that was
        begun by now is done, or something newer. The result is for `end`."""

    @abstractmethod
    def end(self, layer: int, place: Place, stage: int, begun: object) -> None:
        """On another thread, in the order of `begin`; returns when it is on its way."""

    @abstractmethod
    def receive(self, layer: int, place: Place, stage: int) -> None:
        """Take it from `stage`; returns when it is there."""

    @torch.inference_mode()
    def try_out(self, stage: int, owners: Mapping[int, list[int]]) -> None:
        """Send known values over every link once, on all stages together, before any KV is used.

        `owners` are the stages that may own each layer. Raises EngineDeadError.
        """
        for layer in sorted(owners):
            edges = [(a, b) for a in owners[layer] for b in owners[layer] if a != b]
            # Every edge has two pages of its own: one that is sent whole, one of which a token is.
            for first, (giver, taker) in zip(range(0, self.num_pages - 1, 2), edges, strict=False):
                for page in (first, first + 1):
                    self._try(layer, page, giver, taker, stage)

    def _try(self, layer: int, page: int, giver: int, taker: int, stage: int) -> None:
        if stage not in (giver, taker):
            return
        number = torch.tensor([page])
        place: Place = Tokens(number, torch.zeros_like(number)) if page % 2 else Pages(number)
        part = self.kv[layer][page, :, :1] if page % 2 else self.kv[layer][page]
        value = float(giver * 10 + taker + 1)
        if stage == giver:
            part.fill_(value)
            self.end(layer, place, taker, self.begin(layer, place, taker))
        else:
            self.receive(layer, place, giver)
            if not bool((part == value).all()):
                raise EngineDeadError(
                    f"KV of a layer that stage {giver} gave to stage {taker} arrived with wrong "
                    "values; use --layer-rebalance off."
                )
        part.zero_()


class LinkedCopies(KvCopies):
    """As messages. A stage computes on the host, at once."""

    def __init__(self, kv: Mapping[int, Tensor], links: LayerLinks) -> None:
        super().__init__(kv)
        self._links = links

    def begin(self, layer: int, place: Place, stage: int) -> object:
        return None

    def end(self, layer: int, place: Place, stage: int, begun: object) -> None:
        for index in self._parts(place):
            self._links.send(self._read(self.kv[layer], index, begun), stage)

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

    def _read(self, kv: Tensor, index: Index, begun: object) -> Tensor:
        return kv[index].contiguous()

    def _write(self, kv: Tensor, index: Index, rows: Tensor) -> None:
        kv[index] = rows
