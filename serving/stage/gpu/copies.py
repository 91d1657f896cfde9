"""KV of layers that move between GPUs: written straight into the other one's memory where this
machine allows it, else through the host."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from serving.kernels.device import gpu_kernels
from serving.stage.copies import Index, KvCopies, LinkedCopies, Pages, Place
from serving.transport.connect import agree
from serving.transport.cuda import CudaDriver, LinkRefusedError, StreamDriver
from serving.transport.layers import LayerLinks
from serving.transport.peer import Exchange

__all__ = ["HostCopies", "PeerCopies", "connect_copies"]


class _Marks:
    """What copies need of the stream on which the stage computes, and streams of their own."""

    def __init__(self, compute: torch.cuda.Stream, device: torch.device) -> None:
        self._compute, self.device = compute, device
        self.out: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.into: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def now(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._compute)
        return event

    def wait(self, since: object) -> None:
        """The stream of what goes out waits for a mark."""
        if not isinstance(since, torch.cuda.Event):
            raise AssertionError("copies between GPUs wait for marks of their own")
        self.out.wait_event(since)


class HostCopies(LinkedCopies):
    """As messages between hosts' memories."""

    def __init__(
        self, kv: Mapping[int, Tensor], links: LayerLinks, compute: torch.cuda.Stream
    ) -> None:
        super().__init__(kv, links)
        self._marks = _Marks(compute, next(iter(kv.values())).device)

    def mark(self) -> object:
        return self._marks.now()

    def _read(self, kv: Tensor, index: Index, since: object) -> Tensor:
        with torch.cuda.device(kv.device), torch.cuda.stream(self._marks.out):
            self._marks.wait(since)
            return kv[_on(kv.device, index)].contiguous().cpu()

    def _write(self, kv: Tensor, index: Index, rows: Tensor) -> None:
        with torch.cuda.device(kv.device), torch.cuda.stream(self._marks.into):
            kv[_on(kv.device, index)] = rows.to(kv.device)
            self._marks.into.synchronize()


class PeerCopies(KvCopies):
    """A kernel writes into the other stage's memory, which is mapped here; a message follows when
    it is there. `targets` are the addresses of (layer, stage), `links` carry the messages.
    """

    def __init__(
        self,
        kv: Mapping[int, Tensor],
        links: LayerLinks,
        compute: torch.cuda.Stream,
        targets: Mapping[tuple[int, int], int],
        kernels: ModuleType,
    ) -> None:
        super().__init__(kv)
        self._links, self._targets, self._kernels = links, targets, kernels
        self._marks = _Marks(compute, next(iter(kv.values())).device)

    def mark(self) -> object:
        return self._marks.now()

    def send(self, layer: int, place: Place, stage: int, since: object) -> None:
        kv, marks = self.kv[layer], self._marks
        with torch.cuda.device(kv.device), torch.cuda.stream(marks.out):
            marks.wait(since)
            starts, length = _rows(place, kv)
            target = self._targets[layer, stage]
            self._kernels.push_rows(kv, target, starts.to(kv.device), length)
            marks.out.synchronize()
        self._links.send(torch.ones(1, dtype=torch.uint8), stage)

    def receive(self, layer: int, place: Place, stage: int) -> None:
        self._links.receive(torch.empty(1, dtype=torch.uint8), stage)


def connect_copies(
    stage: int,
    owners: Mapping[int, list[int]],
    kv: Mapping[int, Tensor],
    links: LayerLinks,
    compute: torch.cuda.Stream,
    exchange: Exchange,
    stages: int,
    driver: StreamDriver | None = None,
) -> tuple[KvCopies, str]:
    """The copies of one stage, of the same kind on all, and how they go, in words. `owners` are the
    stages that hold each layer; each allocates its KV by itself, so that others can map it.
    """
    refusal = ""
    mine = [layer for layer in kv if len(owners[layer]) > 1]
    targets: dict[tuple[int, int], int] = {}
    try:
        driver = driver or CudaDriver(next(iter(kv.values())).device)
        handles = {layer: driver.export(kv[layer].data_ptr()).hex() for layer in mine}
    except LinkRefusedError as error:
        refusal, handles = str(error), {}
    for layer in mine:
        exchange.publish(_key(layer, stage), handles.get(layer, ""))
    for layer in mine:
        for other in owners[layer]:
            handle = exchange.lookup(_key(layer, other)) if other != stage else ""
            if not handle or refusal or driver is None:
                continue
            try:
                targets[layer, other] = driver.open(bytes.fromhex(handle))
            except LinkRefusedError as error:
                refusal = str(error)
    why = agree(stage, stages, refusal, exchange)
    kernels = gpu_kernels()
    if why or kernels is None:
        return HostCopies(kv, links, compute), f"through the host; no peer copies {why}"
    return PeerCopies(kv, links, compute, targets, kernels), "straight into their memory"


def _key(layer: int, stage: int) -> str:
    return f"kv-of-{layer}-on-{stage}"


def _on(device: torch.device, index: Index) -> tuple[Tensor | slice, ...]:
    return tuple(part.to(device) if isinstance(part, Tensor) else part for part in index)


def _rows(place: Place, kv: Tensor) -> tuple[Tensor, int]:
    """Where equally long rows of a layer's KV begin, [n] int64 in elements, and their length."""
    _, both, page_size, *row = kv.shape
    if isinstance(place, Pages):
        length = kv[0].numel()
        return place.pages * length, length
    length = row[0] * row[1]
    halves = place.pages[:, None] * both + torch.arange(both)
    return ((halves * page_size + place.offsets[:, None]) * length).view(-1), length
