"""Links by communicators of two ranks, with gloo in NCCL's place and a thread a stage."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport import nccl_links
from serving.transport.nccl_links import NcclTransport

dist: Any = torch.distributed

WIDTH, MOST, ROWS, STEPS = 3, 8, 5, 30


class _Stream:
    """Work runs when it is launched; counts what is made to wait. It is not through while `stuck`
    is set."""

    stuck: threading.Event | None = None

    def __init__(self, device: object = None) -> None:
        self.device = torch.device("cpu")
        self.waits = 0

    def wait_event(self, event: object) -> None:
        self.waits += 1

    def synchronize(self) -> None:
        if self.stuck is not None:
            self.stuck.wait(30)


class _Event:
    def record(self, stream: object = None) -> None: ...


class _Links:
    """What NCCL's process groups offer, by gloo."""

    class Options:
        _timeout = timedelta(seconds=1)

    def __init__(self, store: Any, rank: int, size: int, options: _Links.Options) -> None:
        assert size == 2
        assert options._timeout > timedelta(hours=1), "an idle stage would be ended"
        settings = dist.ProcessGroupGloo._Options()
        settings._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        settings._timeout = timedelta(seconds=30)
        self._group = dist.ProcessGroupGloo(store, rank, size, settings)
        self._sends: list[tuple[Any, Tensor]] = []

    def send(self, tensors: list[Tensor], other: int, tag: int) -> Any:
        """Does not wait: on a GPU only a stream does."""
        sent = tensors[0].clone()
        self._sends.append((self._group.send([sent], other, tag), sent))
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensors: list[Tensor], other: int, tag: int) -> Any:
        return self._group.recv(tensors, other, tag)


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("Stream", _Stream),
        ("Event", _Event),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("synchronize", lambda device: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    library = SimpleNamespace(ProcessGroupNCCL=_Links, PrefixStore=dist.PrefixStore)
    monkeypatch.setattr(nccl_links, "dist", library)


def _run(stages: int, folder: Path, work: Any) -> None:
    errors: list[BaseException] = []
    kept: list[NcclTransport] = []  # a link that is let go breaks on the other side

    def run(stage: int) -> None:
        try:
            stream: Any = _Stream()
            store = dist.FileStore(str(folder / "rendezvous"), stages)
            links = NcclTransport(
                stage, stages, stream, store,
                max_tokens=MOST, hidden_size=WIDTH, dtype=torch.float32, max_rows=ROWS,
            )  # fmt: skip
            kept.append(links)
            work(stage, links)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(stage,), daemon=True) for stage in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive(), "a stage hangs"
    for error in errors:
        raise error


@pytest.mark.parametrize("stages", [2, 3])
def test_rows_and_tokens_arrive(stages: int, tmp_path: Path) -> None:
    last = stages - 1

    def work(stage: int, links: NcclTransport) -> None:
        links.warm_up()
        for number in range(STEPS):
            rows = 1 + number % MOST
            if stage == 0 and number > 1:
                # One behind, as a first stage does that has launched a micro-batch in between.
                entry = links.incoming_tokens(number - 2)
                assert entry[1, :ROWS].tolist() == [100 * (number - 2) + i for i in range(ROWS)]
            if stage > 0:
                found = links.incoming(number, rows)
                assert found.shape == (rows, WIDTH)
                assert (found == float(number + stage - 1)).all()
                links.taken(number)
            if stage < last:
                links.outgoing(number, rows).fill_(float(number + stage))
                links.send(number, rows)
            else:
                entry = links.outgoing_tokens(number)
                entry[1, :ROWS] = torch.arange(ROWS, dtype=torch.int32) + 100 * number
                links.send_tokens(number)
        if stage == 0:
            links.incoming_tokens(STEPS - 2)
            links.incoming_tokens(STEPS - 1)

    _run(stages, tmp_path, work)


def test_the_check_at_the_start_names_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = _Links.send

    def lose(self: _Links, tensors: list[Tensor], other: int, tag: int) -> Any:
        return send(self, [torch.zeros_like(tensors[0])], other, tag)

    monkeypatch.setattr(_Links, "send", lose)
    with pytest.raises(EngineDeadError, match="from stage 0 to stage 1 by NCCL carried wrong"):
        _run(2, tmp_path, lambda stage, links: links.warm_up() if stage else links.send(0, 8))


def test_a_link_that_carries_nothing_is_named_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_links, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(nccl_links, "_CLOSE_SECONDS", 0.05)
    stuck = threading.Event()
    monkeypatch.setattr(_Stream, "stuck", stuck)

    def work(stage: int, links: NcclTransport) -> None:
        try:
            if stage:
                links.warm_up()
            else:
                links.send(0, MOST)
        finally:
            links.close()

    with pytest.raises(EngineDeadError, match="from stage 0 to stage 1 by NCCL carried nothing"):
        _run(2, tmp_path, work)
    stuck.set()
