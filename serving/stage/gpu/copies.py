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


class _Streams:
    """The one on which the stage computes, and others for copies."""

    def __init__(self, compute: torch.cuda.Stream, device: torch.device) -> None:
        self._compute = compute
        self.out: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.into: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def computed(self) -> torch.cuda.Event:
        """Reached when all that was launched to compute by now is done."""
        return _mark(self._compute)


class HostCopies(LinkedCopies):
    """As messages between hosts' memories."""

    def __init__(
        self, kv: Mapping[int, Tensor], links: LayerLinks, compute: torch.cuda.Stream
    ) -> None:
        super().__init__(kv, links)
        self._streams = _Streams(compute, next(iter(kv.values())).device)

    def begin(self, layer: int, place: Place, stage: int) -> object:
        return self._streams.computed()

    def _read(self, kv: Tensor, index: Index, begun: object) -> Tensor:
        _event(begun).synchronize()
        with torch.cuda.device(kv.device), torch.cuda.stream(self._streams.out):
            return kv[_on(kv.device, index)].contiguous().cpu()

    def _write(self, kv: Tensor, index: Index, rows: Tensor) -> None:
        with torch.cuda.device(kv.device), torch.cuda.stream(self._streams.into):
            kv[_on(kv.device, index)] = rows.to(kv.device)
            self._streams.into.synchronize()


class PeerCopies(KvCopies):
    """A kernel writes into the other stage's memory, which is mapped here; a message follows when
    it is there. `targets` are the addresses of (layer, stage), `links` carry the messages.

    Kernels are launched where the stage launches its own, each behind what it copies and before
    what comes later, so that streams may share a queue of the device.
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
        self._streams = _Streams(compute, next(iter(kv.values())).device)

    def begin(self, layer: int, place: Place, stage: int) -> object:
        kv, streams = self.kv[layer], self._streams
        starts, length = _rows(place, kv)
        computed = streams.computed()
        with torch.cuda.device(kv.device), torch.cuda.stream(streams.out):
            # Before the wait: nothing on the host waits for the device's work.
            there = starts.pin_memory().to(kv.device, non_blocking=True)
            streams.out.wait_event(computed)
            self._kernels.push_rows(kv, self._targets[layer, stage], there, length)
            return _mark(streams.out)

    def end(self, layer: int, place: Place, stage: int, begun: object) -> None:
        _event(begun).synchronize()
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
    """The copies of one stage, of the same kind on all, and how they go, in words.

    `owners` are the stages that hold each layer; each has its KV in an allocation of its own, so
    that others can map it.
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
    copies: KvCopies
    if why or kernels is None:
        copies, how = HostCopies(kv, links, compute), f"through the host; no peer copies {why}"
    else:
        copies = PeerCopies(kv, links, compute, targets, kernels)
        how = "straight into the other stage's memory"
    return copies, how


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _event(begun: object) -> torch.cuda.Event:
    if not isinstance(begun, torch.cuda.Event):
        raise AssertionError("copies between GPUs wait for events")
    return begun


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
