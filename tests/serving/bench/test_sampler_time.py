"""The command that times the sampler: what it refuses here, what it prints on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from serving.bench.sampler_time import KINDS, main

app = Typer()
app.command()(main)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "nvidia-smi" in result.output


@pytest.mark.gpu
def test_every_kind_is_timed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")
    result = CliRunner().invoke(app, ["--rows", "3", "--vocab", "5000", "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert {(row["kind"], row["logits"]) for row in rows} == {
        (kind, shape) for kind in KINDS for shape in ("flat", "peaked")
    }
    assert all(row["device_us"] > 0 and row["host_us"] > 0 for row in rows)


def test_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = CliRunner().invoke(app, ["--kind", "beams"])
    assert result.exit_code == 1
    assert "top_p=0.9" in result.output
