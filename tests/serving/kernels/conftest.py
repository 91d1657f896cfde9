"""Kernels built once for the session, away from the person's own cache; poisoned fresh tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving import kernels
from serving.kernels import library


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for the session's build."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def native(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Native code is on, or the test is skipped."""
    monkeypatch.setenv("LECTERN_HOME", str(built))
    monkeypatch.setenv("LECTERN_NATIVE", "1")
    library.reset()
    if kernels.native() is None:
        pytest.skip("needs AVX-512 with bf16 and a C++ compiler (install g++)")
    yield
    library.reset()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Native code is off."""
    monkeypatch.setenv("LECTERN_NATIVE", "0")
    library.reset()
    yield
    library.reset()


@pytest.fixture(params=["native", "plain"])
def mode(request: pytest.FixtureRequest) -> str:
    """The test runs with native code and without."""
    request.getfixturevalue(request.param)
    return str(request.param)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten in a fresh tensor shows as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
