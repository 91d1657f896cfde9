"""Building the native kernels, and living without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serving import kernels
from serving.kernels import compile as building
from serving.kernels import library
from serving.kernels.linear import OnednnLinear


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LECTERN_HOME", str(tmp_path))
    monkeypatch.delenv("LECTERN_NATIVE", raising=False)
    library.reset()
    yield
    library.reset()


def compiler(path: Path, script: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n{script}\n')
    path.chmod(0o755)
    return str(path)


def works_without(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.INFO, logger="serving.kernels"):
        assert kernels.native() is None
    assert reason in caplog.text
    assert "plain torch" in caplog.text
    weight, x = torch.randn(8, 16).bfloat16(), torch.randn(2, 16).bfloat16()
    got = kernels.pack_linear(weight)(x).double()
    assert torch.allclose(got, x.double() @ weight.double().T, atol=0.05)


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with all that native code needs, whatever this one is."""
    monkeypatch.setattr(building, "processor_features", lambda: building.NEEDED)


@pytest.mark.usefixtures("features")
def test_a_failing_compiler_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = compiler(tmp_path / "failing", "echo 'x.cpp:1: error: no such thing' >&2; exit 1")
    monkeypatch.setenv("CXX", failing)
    works_without(caplog, f"{failing} failed: x.cpp:1: error: no such thing")
    assert list(building.cache_folder().glob("*.so")) == []


@pytest.mark.usefixtures("features")
def test_an_object_that_does_not_load_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path / "junk", script))
    works_without(caplog, "no native kernels")


@pytest.mark.usefixtures("features")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    works_without(caplog, "there is no C++ compiler")


def test_an_older_processor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "processor_features", lambda: frozenset({"avx2"}))
    works_without(caplog, "the processor has no avx512_bf16")


@pytest.mark.usefixtures("features")
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("CXX", compiler(tmp_path / "fine", "exit 0"))
    works_without(caplog, "cannot be written")


def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LECTERN_NATIVE", "0")
    works_without(caplog, "LECTERN_NATIVE=0")


@pytest.mark.usefixtures("features")
def test_processes_that_start_together_compile_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'echo x >> {tmp_path}/runs; while [ "$1" != -o ]; do shift; done; echo y > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path / "counting", script))
    code = (
        "from serving.kernels import compile as c; "
        "c.processor_features = lambda: c.NEEDED; print(c.build())"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in several}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "y\n"
    assert (tmp_path / "runs").read_text() == "x\n"


def test_another_compiler_or_flag_is_another_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo y > "$2"'
    monkeypatch.setattr(building, "processor_features", lambda: building.NEEDED)
    monkeypatch.setenv("CXX", compiler(tmp_path / "one", script))
    first = building.build()
    assert building.build() == first
    monkeypatch.setenv("CXX", compiler(tmp_path / "two", script))
    second = building.build()
    monkeypatch.setattr(building, "processor_features", lambda: building.NEEDED | {"amx_bf16"})
    assert len({first, second, building.build()}) == 3


def test_onednn_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("needs a processor on which oneDNN multiplies bf16")
    monkeypatch.setenv("LECTERN_NATIVE", "0")
    weight, bias = torch.randn(70, 48).bfloat16(), torch.randn(70).bfloat16()
    linear = kernels.pack_linear(weight.clone(), bias)
    assert isinstance(linear, OnednnLinear)
    x = torch.randn(5, 48).bfloat16()
    wanted = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(linear(x).double(), wanted, atol=0.2)
    ids = torch.tensor([3, 69])
    assert torch.equal(linear.rows(ids), weight[ids])
    assert torch.allclose(linear(x).double(), wanted, atol=0.2)
