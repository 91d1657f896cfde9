"""Ranks over NCCL with a library that does NCCL's work on the CPU, between threads."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

from serving.errors import ConfigError, EngineDeadError
from serving.transport import nccl_group
from serving.transport.nccl_group import NcclTensorGroup

STREAM = 0x5EED
NAME = bytes(range(128))
_WIDTHS = {6: torch.float16, 7: torch.float32, 9: torch.bfloat16}


class _Wire:
    """What the ranks of one communicator share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.sent: dict[int, Tensor] = {}
        self.fault = 0


class _Library:
    """One rank's view of the wire, called as NCCL is."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self._rank = -1

    def ncclGetUniqueId(self, name: Any) -> int:
        ctypes.memmove(name, NAME, len(NAME))
        return 0

    def ncclCommInitRank(self, communicator: Any, size: int, name: Any, rank: int) -> int:
        assert bytes(name) == NAME
        assert size == self._wire.size
        self._rank = rank
        return 0

    def ncclAllReduce(
        self, source: int, into: int, count: int, kind: int, operation: int, _: Any, stream: int
    ) -> int:
        assert (source, operation, stream) == (into, 0, STREAM)
        return self._meet(source, into, count, kind, lambda parts: torch.stack(parts).sum(0))

    def ncclAllGather(
        self, source: int, into: int, count: int, kind: int, _: Any, stream: int
    ) -> int:
        assert stream == STREAM
        return self._meet(source, into, count, kind, torch.cat)

    def ncclGetErrorString(self, code: int) -> bytes:
        return b"unhandled system error"

    def _meet(
        self,
        source: int,
        into: int,
        count: int,
        kind: int,
        work: Callable[[list[Tensor]], Tensor],
    ) -> int:
        dtype = _WIDTHS[kind]
        held = bytearray(ctypes.string_at(source, count * dtype.itemsize))
        self._wire.sent[self._rank] = torch.frombuffer(held, dtype=dtype)
        self._wire.barrier.wait(20)
        result = work([self._wire.sent[rank] for rank in range(self._wire.size)])
        self._wire.barrier.wait(20)
        ctypes.memmove(into, result.data_ptr(), result.numel() * dtype.itemsize)
        return self._wire.fault


def run(
    size: int, folder: Path, monkeypatch: pytest.MonkeyPatch, wire: _Wire,
    work: Callable[[NcclTensorGroup], Any],
) -> list[Any]:  # fmt: skip
    monkeypatch.setattr(nccl_group, "_load", lambda: _Library(wire))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(nccl_group, "_WARM_UP", (8, 100))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def of(rank: int) -> None:
        try:
            store: Any = torch.distributed.FileStore(str(folder / "store"), size)
            group = NcclTensorGroup(store, 3, rank, size, torch.device("cpu"))
            group.warm_up()
            results[rank] = work(group)
        except BaseException as error:
            errors.append(error)
            wire.barrier.abort()

    threads = [threading.Thread(target=of, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_gatherings(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = torch.arange(3 * 4 * 5).view(3, 4, 5).to(dtype)

    def work(group: NcclTensorGroup) -> tuple[Tensor, Tensor]:
        mine = parts[group.rank].clone()
        group.all_reduce(mine)
        # A view whose rows lie apart is gathered like any other.
        wide = torch.cat((parts[group.rank], parts[group.rank]), dim=1)
        return mine, group.all_gather(wide[:, :5])

    for summed, gathered in run(3, tmp_path, monkeypatch, _Wire(3), work):
        assert torch.equal(summed, parts.sum(0))
        assert torch.equal(gathered, torch.cat(tuple(parts), dim=1))
        assert gathered.is_contiguous()


def test_only_whole_tensors_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: NcclTensorGroup) -> None:
        with pytest.raises(ValueError, match="contiguous"):
            group.all_reduce(torch.zeros(4, 4)[:, :2])

    run(2, tmp_path, monkeypatch, _Wire(2), work)


def test_an_error_of_nccl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = _Wire(2)

    def work(group: NcclTensorGroup) -> None:
        wire.fault = 2
        group.all_reduce(torch.zeros(3))

    with pytest.raises(EngineDeadError, match=r"ranks of stage 3 \(unhandled system error\)"):
        run(2, tmp_path, monkeypatch, wire, work)


def test_links_that_lose_data_are_found_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(self: NcclTensorGroup, tensor: Tensor) -> None:
        tensor.fill_(1.0)

    monkeypatch.setattr(NcclTensorGroup, "all_reduce", lossy)
    with pytest.raises(EngineDeadError, match="NCCL summed wrongly between the GPUs of stage 3"):
        run(2, tmp_path, monkeypatch, _Wire(2), lambda group: None)


def test_without_nccl_the_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ConfigError, match=r"libnccl\.so\.2") as error:
        nccl_group._load()
    assert error.value.flag == "--tensor-parallel-size"
