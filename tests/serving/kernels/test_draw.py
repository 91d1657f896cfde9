"""The native drawing pass against the cumulative distribution in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels import native_draw

pytestmark = pytest.mark.usefixtures("native")


def drawn(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    tokens = native_draw(logits, temperature, uniform)
    assert tokens is not None
    return tokens


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 151_936), (3, 255), (9, 4097), (40, 512)])
def test_the_token_holds_the_uniform_number(rows: int, vocab: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    temperature = torch.rand(rows, generator=generator) * 2 + 0.3
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).clamp_min(1e-9)
    tokens = drawn(logits, temperature, uniform)
    mass = torch.softmax(logits.double() / temperature.double().unsqueeze(1), -1)
    ends = mass.cumsum(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    begins = ends - mass.gather(1, tokens.unsqueeze(1)).squeeze(1)
    # Sums of float32 parts: a number this close to an edge may fall on either side.
    assert (begins - 2e-6 <= uniform).all()
    assert (uniform <= ends + 2e-6).all()


def test_a_row_does_not_see_its_neighbours(threads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(11, 5000, generator=generator) * 3
    temperature = torch.full((11,), 0.8)
    uniform = torch.rand(11, generator=generator, dtype=torch.float64)
    together = drawn(logits, temperature, uniform)
    for row in range(11):
        one = slice(row, row + 1)
        assert drawn(logits[one], temperature[one], uniform[one]) == together[row]


@pytest.mark.parametrize("uniform", [1e-17, 0.5, 1 - 1e-16])
def test_never_a_token_without_mass(uniform: float, threads: int) -> None:
    logits = torch.full((4, 1000), -torch.inf)
    logits[0, 0] = logits[1, 999] = logits[2, 300] = 5.0
    logits[3, 257], logits[3, 700] = 80.0, -80.0
    tokens = drawn(logits, torch.ones(4), torch.full((4,), uniform, dtype=torch.float64))
    assert tokens.tolist() == [0, 999, 300, 257]


def test_extreme_temperatures_and_logits(threads: int) -> None:
    logits = torch.tensor([[1e4, -1e4, 9.9e3, 0.0], [0.0, 1e-3, 0.0, 0.0]])
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert drawn(logits, torch.tensor([1e-5, 1e-5]), half).tolist() == [0, 1]
    # At a very high temperature the four tokens are alike.
    assert drawn(logits, torch.tensor([1e9, 1e9]), half + 0.01).tolist() == [2, 2]


def test_other_logits_are_not_taken() -> None:
    half = torch.full((1,), 0.5, dtype=torch.float64)
    assert native_draw(torch.zeros(1, 4, dtype=torch.float64), torch.ones(1), half) is None
