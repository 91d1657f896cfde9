"""Filters, draws, penalties and log probabilities compiled, on a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.serving.kernels import selection_checks as checks
from tests.serving.kernels.interpreted import compiled_kernels

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels() -> ModuleType:
    return compiled_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 1000, 9000, 151_936])
def test_floors(kernels: ModuleType, vocab: int, dtype: torch.dtype) -> None:
    checks.check_floors(kernels, "cuda", dtype, vocab)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [3, 5000, 151_936])
def test_draws(kernels: ModuleType, vocab: int, dtype: torch.dtype) -> None:
    checks.check_draws(kernels, "cuda", dtype, vocab)


@pytest.mark.parametrize(
    "settings",
    [(1.0, 0, 1.0, 0.0), (1.0, 6, 1.0, 0.0), (0.8, 0, 0.7, 0.0), (1.0, 12, 0.9, 0.05)],
)
def test_distribution(kernels: ModuleType, settings: checks.Settings) -> None:
    checks.check_distribution(kernels, "cuda", settings, 40_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows_are_drawn_alike(kernels: ModuleType, dtype: torch.dtype) -> None:
    checks.check_plain_rows(kernels, "cuda", dtype, 151_936)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 5000, 151_936])
def test_logprobs(kernels: ModuleType, vocab: int, dtype: torch.dtype) -> None:
    checks.check_logprobs(kernels, "cuda", dtype, vocab)


def test_penalties(kernels: ModuleType) -> None:
    checks.check_penalties(kernels, "cuda")
