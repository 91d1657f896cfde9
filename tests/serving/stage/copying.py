"""Stages of one process whose copies of KV are linked: addresses are shared, messages queued."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import Queue
from typing import Any

from torch import Tensor

from serving.stage.copies import KvCopies
from serving.transport.cuda import LinkRefusedError
from serving.transport.layers import LayerLinks
from tests.serving.transport.simulated_gpu import Notes


class Driver:
    """Memory of one process, some of which may not be shared."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses

    def export(self, address: int) -> bytes:
        if self.refuses == "export":
            raise LinkRefusedError("no handles here")
        return address.to_bytes(8, "little")

    def open(self, handle: bytes) -> int:
        if self.refuses == "open":
            raise LinkRefusedError("no access here")
        return int.from_bytes(handle, "little")


class Wires:
    """Messages between stages, which the threads of copies send and wait for."""

    def __init__(self) -> None:
        self.queues: defaultdict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)

    def links(self, stage: int) -> LayerLinks:
        wires = self

        class Links(LayerLinks):
            def send(self, rows: Tensor, peer: int) -> None:
                wires.queues[stage, peer].put(rows.clone())

            def receive(self, rows: Tensor, peer: int) -> None:
                rows.copy_(wires.queues[peer, stage].get(timeout=20))

        return Links()


def connect(
    kv: list[dict[int, Tensor]],
    owners: dict[int, list[int]],
    drivers: list[Driver],
    stream: Any,
) -> tuple[list[KvCopies], list[str]]:
    from serving.stage.gpu.copies import connect_copies

    notes, wires, stages = Notes(), Wires(), len(kv)

    def one(stage: int) -> tuple[KvCopies, str]:
        driver: Any = drivers[stage]
        copies, how = connect_copies(
            stage, owners, kv[stage], wires.links(stage), stream, notes, stages, driver
        )
        copies.try_out(stage, owners)
        return copies, how

    with ThreadPoolExecutor(stages) as pool:
        futures = [pool.submit(one, stage) for stage in range(stages)]
        # One that fails makes others wait in vain: its own failure is the one to see.
        for future in as_completed(futures):
            future.result()
        made = [future.result() for future in futures]
    return [copies for copies, _ in made], [how for _, how in made]
