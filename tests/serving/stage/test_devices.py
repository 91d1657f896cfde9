"""The device of each stage, and what is said where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serving.config.engine import EngineConfig
from serving.errors import ConfigError
from serving.stage.devices import choose_device, workers_on


def _found(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def _config(**settings: Any) -> EngineConfig:
    return EngineConfig(model=Path("/nowhere"), **settings)


@pytest.mark.parametrize(
    ("gpus", "settings", "stage", "expected"),
    [
        (0, {"pipeline_parallel_size": 3}, 2, "cpu"),
        (1, {}, 0, "cuda:0"),
        (4, {"pipeline_parallel_size": 4}, 3, "cuda:3"),
        (4, {"pipeline_parallel_size": 2, "device": "cuda"}, 1, "cuda:1"),
        (4, {"pipeline_parallel_size": 8, "device": "cpu"}, 5, "cpu"),
        (1, {"pipeline_parallel_size": 2, "devices": ["cuda", "cuda:0"]}, 0, "cuda:0"),
        (4, {"pipeline_parallel_size": 2, "devices": ["cuda:3", "cuda:1"]}, 0, "cuda:3"),
    ],
)
def test_choice(
    gpus: int, settings: dict[str, Any], stage: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _found(monkeypatch, gpus)
    assert choose_device(_config(**settings), stage) == torch.device(expected)


def test_ranks_of_a_stage_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, 4)
    config = _config(pipeline_parallel_size=2, tensor_parallel_size=2)
    assert [choose_device(config, stage, rank).index for stage in (0, 1) for rank in (0, 1)] == [
        0, 1, 2, 3
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "settings", "says", "flag"),
    [
        (1, {"pipeline_parallel_size": 2}, "need 2 GPUs, and torch finds 1 GPU here; lower "
         "--pipeline-parallel-size", "--pipeline-parallel-size"),
        (3, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "device": "cuda"},
         "2 pipeline stages of 2 ranks need 4 GPUs", "--pipeline-parallel-size"),
        (1, {"tensor_parallel_size": 2}, "lower --tensor-parallel-size", "--tensor-parallel-size"),
        (0, {"device": "cuda"}, "for 1 pipeline stage, and torch finds no GPU here; check the "
         "driver", "--device"),
        (0, {"attention": "flashinfer"}, "runs on NVIDIA GPUs", "--attention"),
        (1, {"pipeline_parallel_size": 2, "devices": ["cuda:0", "cuda:1"]},
         "names cuda:1, and torch finds 1 GPU", "--devices"),
        (2, {"pipeline_parallel_size": 2, "devices": ["cuda:0", "cpu"]}, "mixes", "--devices"),
        (0, {"pipeline_parallel_size": 2, "transport": "peer"}, "leave it at auto", "--transport"),
    ],
)  # fmt: skip
def test_refusals(
    gpus: int, settings: dict[str, Any], says: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _found(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=says) as caught:
        choose_device(_config(**settings), 0)
    assert caught.value.flag == flag


def test_who_shares_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _found(monkeypatch, 2)
    config = _config(pipeline_parallel_size=3, devices=["cuda", "cuda:1", "cuda:0"])
    counts = [workers_on(config, choose_device(config, stage)) for stage in range(3)]
    assert counts == [2, 1, 2]
    assert workers_on(_config(), torch.device("cuda:0")) == 1
