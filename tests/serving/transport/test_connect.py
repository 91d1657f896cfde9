"""All stages choose the same kind of link, through the file they share."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.errors import ConfigError
from serving.transport import connect
from serving.transport.connect import StoreExchange, connect_stages
from serving.transport.cuda import LinkRefusedError
from tests.serving.transport.simulated_gpu import SimulatedGpu, World


class _NoMapping(SimulatedGpu):
    def open(self, handle: bytes) -> int:
        raise LinkRefusedError("cuIpcOpenMemHandle_v2 answered CUDA_ERROR_NOT_SUPPORTED")


class _Nccl:
    name = "NCCL"
    device_bytes = 1 << 20

    def __init__(self, *arguments: object, **sizes: object) -> None: ...

    def warm_up(self) -> None: ...


def _connect(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    kind: str,
    *,
    refused: tuple[int, ...] = (),
    old: tuple[int, ...] = (),
    shared: bool = False,
    stages: int = 3,
) -> list[Any]:
    """What each stage got: links and a sentence, or an error."""
    world = World(0)

    def driver(device: torch.device) -> SimulatedGpu:
        if device.index in old:
            raise LinkRefusedError("the GPU driver is too old")
        return (_NoMapping if device.index in refused else SimulatedGpu)(world)

    monkeypatch.setattr(connect, "CudaDriver", driver)
    monkeypatch.setattr(connect, "NcclTransport", _Nccl)
    compute = [SimulatedGpu(world).stream() for _ in range(stages)]
    found: list[Any] = [None] * stages

    def run(stage: int) -> None:
        stream: Any = SimpleNamespace(
            device=torch.device("cuda", stage), cuda_stream=compute[stage]
        )
        try:
            found[stage] = connect_stages(
                kind, stage, stages, stream, StoreExchange(str(folder / "rendezvous"), stages),
                max_tokens=8, hidden_size=4, dtype=torch.float32, max_rows=4, shared=shared,
            )  # fmt: skip
        except ConfigError as error:
            found[stage] = error

    threads = [threading.Thread(target=run, args=(stage,), daemon=True) for stage in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a stage hangs"
    return found


@pytest.mark.parametrize("kind", ["auto", "peer"])
def test_peer_links_where_they_are_allowed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for links, sentence in _connect(monkeypatch, tmp_path, kind):
        assert links.name == "peer copies (CUDA IPC)"
        assert sentence.startswith("linked by peer copies (CUDA IPC), ")


@pytest.mark.parametrize("how", ["refused", "old"])
def test_one_refusal_means_nccl_for_all(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing: dict[str, Any] = {how: (1,)}
    for links, sentence in _connect(monkeypatch, tmp_path, "auto", **refusing):
        assert links.name == "NCCL"
        assert "no peer copies on stage" in sentence


def test_peer_links_that_were_asked_for_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in _connect(monkeypatch, tmp_path, "peer", refused=(2,)):
        assert isinstance(error, ConfigError)
        assert error.flag == "--transport"
        assert "on stage 2: cuIpcOpenMemHandle_v2 answered" in str(error)


@pytest.mark.parametrize(("kind", "refused"), [("nccl", ()), ("auto", (0,))])
def test_nccl_cannot_link_stages_on_one_gpu(
    kind: str, refused: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in _connect(monkeypatch, tmp_path, kind, refused=refused, shared=True):
        assert isinstance(error, ConfigError)
        assert "can only be linked by peer copies" in str(error)


def test_nccl_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _connect(monkeypatch, tmp_path, "nccl")
    assert [sentence for _, sentence in found] == ["linked by NCCL, 1 MiB of buffers"] * 3
