"""Links between real GPUs, a process a stage: what arrives is what was sent, under load.

`python -m pytest -m gpu -s` prints what a micro-batch takes for some sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[3]


def _needs(gpus: int) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < gpus:
        pytest.skip(f"needs {gpus} NVIDIA GPUs, and there are {found} here")


def _run(devices: list[str], folder: Path, kind: str, seed: int, load: str) -> list[dict[str, Any]]:
    """What every stage printed, in order."""
    shared = "1" if len(set(devices)) < len(devices) else "0"
    stages = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.serving.transport.gpu_stage",
                str(stage), str(len(devices)), device, shared, str(folder / "rendezvous"),
                kind, str(seed), load,
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for stage, device in enumerate(devices)
    ]  # fmt: skip
    try:
        outcomes = [process.communicate(timeout=240) for process in stages]
    finally:
        for process in stages:
            process.kill()
    for process, (_, errors) in zip(stages, outcomes, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out) for out, _ in outcomes]


def _separate(stages: int) -> list[str]:
    _needs(stages)
    return [f"cuda:{stage}" for stage in range(stages)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["peer", "nccl"])
@pytest.mark.parametrize("stages", [2, 4])
def test_transfers_between_gpus(stages: int, kind: str, seed: int, tmp_path: Path) -> None:
    for found in _run(_separate(stages), tmp_path, kind, seed, "random"):
        assert found["wrong"] == 0, found


@pytest.mark.parametrize("stages", [2, 3])
def test_transfers_between_processes_on_one_gpu(stages: int, tmp_path: Path) -> None:
    _needs(1)
    for found in _run(["cuda:0"] * stages, tmp_path, "peer", stages, "random"):
        assert found["wrong"] == 0, found


@pytest.mark.parametrize("rows", [1, 64, 256, 2048])
@pytest.mark.parametrize("kind", ["peer", "nccl"])
def test_round_trip(kind: str, rows: int, tmp_path: Path) -> None:
    """Every micro-batch waits for the tokens of the one before: one round from stage 0 to stage 1
    and back a micro-batch, the checks' own kernels included."""
    for found in _run(_separate(2), tmp_path, kind, 0, str(rows)):
        assert found["wrong"] == 0, found
        print(f"{kind} {rows} rows: {found}")


def test_nccl_is_refused_on_a_shared_gpu(tmp_path: Path) -> None:
    _needs(1)
    with pytest.raises(AssertionError, match="can only be linked by peer copies"):
        _run(["cuda:0"] * 2, tmp_path, "nccl", 0, "1")
