"""The calls into the CUDA driver, against a library that writes down what it is asked."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serving.errors import EngineDeadError
from serving.transport.cuda import CudaDriver, LinkRefusedError


class _Library:
    """Every call answers 0 unless `answers` says otherwise; `calls` has their arguments."""

    def __init__(self, missing: str = "") -> None:
        self._missing = missing
        self.answers: dict[str, int] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.made: dict[str, Callable[..., int]] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == self._missing:
            raise AttributeError(name)
        if name not in self.made:

            def call(*arguments: Any) -> int:
                self.calls.append((name, *arguments))
                return self.answers.get(name, 0)

            self.made[name] = call
        return self.made[name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    return _install(monkeypatch, _Library())


def _install(monkeypatch: pytest.MonkeyPatch, library: _Library) -> _Library:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: None)
    return library


def _driver() -> CudaDriver:
    return CudaDriver(torch.device("cuda:0"))


def test_addresses_are_not_cut_and_waits_are_cyclic(library: _Library) -> None:
    driver = _driver()
    assert all(call.restype is ctypes.c_int for call in library.made.values())  # type: ignore[attr-defined]
    wide = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    assert library.made["cuStreamWaitValue32_v2"].argtypes == wide  # type: ignore[attr-defined]
    library.calls.clear()
    driver.wait(7, 1 << 46, 5)
    driver.write(7, 1 << 46, 6)
    driver.copy(7, 1 << 46, 1 << 45, 1 << 33)
    assert library.calls == [
        ("cuStreamWaitValue32_v2", 7, 1 << 46, 5, 0),
        ("cuStreamWriteValue32_v2", 7, 1 << 46, 6, 0),
        ("cuMemcpyAsync", 1 << 46, 1 << 45, 1 << 33, 7),
    ]


@pytest.mark.parametrize("code", [1, 801])
def test_words_go_by_a_fill_where_they_cannot_be_written(library: _Library, code: int) -> None:
    driver = _driver()
    library.answers["cuStreamWriteValue32_v2"] = code
    library.calls.clear()
    driver.write(7, 100, 6)
    driver.write(7, 100, 7)
    assert [call[0] for call in library.calls] == [
        "cuStreamWriteValue32_v2", "cuMemsetD32Async", "cuMemsetD32Async"
    ]  # fmt: skip
    assert library.calls[1:] == [
        ("cuMemsetD32Async", 100, 6, 1, 7), ("cuMemsetD32Async", 100, 7, 1, 7)
    ]  # fmt: skip


def test_a_fault_is_no_refusal(library: _Library) -> None:
    driver = _driver()
    library.answers["cuStreamWriteValue32_v2"] = 700
    with pytest.raises(EngineDeadError, match="cuStreamWriteValue32 failed with error 700"):
        driver.write(7, 100, 6)
    library.answers["cuMemcpyAsync"] = 719
    with pytest.raises(EngineDeadError, match="cuMemcpyAsync failed"):
        driver.copy(7, 1, 2, 3)


def test_what_a_machine_may_refuse(library: _Library, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _driver()
    library.answers["cuIpcOpenMemHandle_v2"] = library.answers["cuStreamWaitValue32_v2"] = 801
    with pytest.raises(LinkRefusedError, match="cuIpcOpenMemHandle_v2 answered"):
        driver.open(bytes(64))
    with pytest.raises(LinkRefusedError, match="cuStreamWaitValue32_v2 answered"):
        driver.wait(1, 2, 3)
    # The library here says of every address that its allocation begins at 0.
    assert len(driver.export(0)) == 64
    with pytest.raises(LinkRefusedError, match="inside another allocation"):
        driver.export(512)
    _install(monkeypatch, _Library(missing="cuStreamWaitValue32_v2"))
    with pytest.raises(LinkRefusedError, match="too old"):
        _driver()


def test_waiting_for_a_stream_ends(library: _Library) -> None:
    driver = _driver()
    assert driver.finished_within([5, 6], 10)
    assert [call[1] for call in library.calls if call[0] == "cuStreamSynchronize"] == [5, 6]
    stuck = threading.Event()

    def synchronize(stream: int) -> int:
        stuck.wait(20)
        return 0

    library.made["cuStreamSynchronize"] = synchronize
    assert not driver.finished_within([5], 0.05)
    stuck.set()
    library.made["cuStreamSynchronize"] = lambda stream: 700
    with pytest.raises(EngineDeadError, match="cuStreamSynchronize failed"):
        driver.finished_within([5], 10)
