"""Filters, draws, penalties and log probabilities of the device in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.serving.kernels import selection_checks as checks
from tests.serving.kernels.interpreted import interpreted_kernels


@pytest.fixture
def kernels() -> ModuleType:
    return interpreted_kernels()


def test_floors(kernels: ModuleType) -> None:
    kinds = ("usual", "peaked", "negative", "few", "tied", "zeros", "tiny")
    checks.check_floors(kernels, "cpu", torch.bfloat16, 1100, kinds)


def test_floors_of_a_tiny_vocabulary(kernels: ModuleType) -> None:
    checks.check_floors(kernels, "cpu", torch.float32, 5, kinds=("usual", "equal", "lone"))


def test_floors_beyond_the_list(kernels: ModuleType) -> None:
    """9,000 tokens are more than a row's list of candidates holds."""
    checks.check_floors(kernels, "cpu", torch.float32, 9000, kinds=("flat", "equal", "near"))


def test_draws(kernels: ModuleType) -> None:
    checks.check_draws(kernels, "cpu", torch.float16, 1030, kinds=("usual", "few", "tied"))


def test_draws_from_a_tiny_vocabulary(kernels: ModuleType) -> None:
    checks.check_draws(kernels, "cpu", torch.float32, 3, kinds=("peaked", "zeros"))


@pytest.mark.parametrize("settings", [(1.0, 6, 1.0, 0.0), (0.8, 0, 0.7, 0.0), (1.0, 12, 0.9, 0.05)])
def test_distribution(kernels: ModuleType, settings: checks.Settings) -> None:
    checks.check_distribution(kernels, "cpu", settings, 300)


def test_plain_rows_are_drawn_alike(kernels: ModuleType) -> None:
    checks.check_plain_rows(kernels, "cpu", torch.bfloat16, 2100)


@pytest.mark.parametrize("vocab", [2, 1100, 5000])
def test_logprobs(kernels: ModuleType, vocab: int) -> None:
    checks.check_logprobs(kernels, "cpu", torch.float32, vocab)


def test_penalties(kernels: ModuleType) -> None:
    checks.check_penalties(kernels, "cpu")
