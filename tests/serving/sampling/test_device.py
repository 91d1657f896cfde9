"""The sampler of a GPU in Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serving.core import SamplingParams
from serving.sampling.device import DeviceSampler
from tests.serving.kernels.interpreted import compiled_kernels, interpreted_kernels
from tests.serving.sampling import device_checks as checks


def test_lives() -> None:
    checks.check_lives(interpreted_kernels(), "cpu", vocab=150, steps=4, seed=1)


def test_neighbours() -> None:
    checks.check_neighbours(interpreted_kernels(), "cpu", torch.float16, 1100)


def test_warm_up() -> None:
    checks.check_warm_up(interpreted_kernels(), "cpu")


def test_what_is_plain() -> None:
    sampler = DeviceSampler(100, 4, "cpu", [3], interpreted_kernels())
    sampler.admit(0, SamplingParams(seed=1, temperature=0.5), [1], 1)
    sampler.admit(1, SamplingParams(temperature=0.0, top_k=5, top_p=0.3), [1], 1)
    sampler.admit(2, SamplingParams(seed=1, top_k=5), [1], 1)
    sampler.admit(3, SamplingParams(seed=1, min_tokens=2), [1], 1)

    def plain(slots: list[int], position: int) -> bool:
        return sampler.all_plain(np.array(slots), np.full(len(slots), position))

    assert plain([0, 1], 1)
    assert not plain([0, 2], 1)
    assert not plain([0, 3], 2)
    assert plain([0, 3], 3)
    numbers = sampler.numbers(np.array([2, 1]), np.array([1, 1]))
    assert numbers.temperature.tolist() == [1.0, 0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [150, 32_000])
def test_lives_on_a_gpu(vocab: int) -> None:
    kernels = compiled_kernels()
    for seed in range(4):
        checks.check_lives(kernels, "cuda", vocab=vocab, steps=30, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1100, 151_936])
def test_neighbours_on_a_gpu(dtype: torch.dtype, vocab: int) -> None:
    checks.check_neighbours(compiled_kernels(), "cuda", dtype, vocab)


@pytest.mark.gpu
def test_warm_up_on_a_gpu() -> None:
    checks.check_warm_up(compiled_kernels(), "cuda")


@pytest.mark.gpu
def test_drawing_waits_for_nothing() -> None:
    """torch raises at every call that would make the host wait for the device."""
    kernels = compiled_kernels()
    vocab, rows = 5000, 11
    pair = checks.Pair(kernels, "cuda", vocab, 16)
    logits = torch.randn(rows, vocab, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    host = np.arange(rows)
    numbers = torch.full((rows,), 0.5, dtype=torch.float64, device="cuda")
    last = torch.zeros(17, dtype=torch.int32, device="cuda")
    out = torch.zeros(rows, dtype=torch.int32, device="cuda")
    sampler = pair.device
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            for slot, params in enumerate(checks.every_kind(step)):
                sampler.admit(slot, params, [1, 2, 3], 3)
            sampler.draw(
                logits, host, np.full(rows, 3), slots=slots, temperature=numbers.float(),
                uniform=numbers, last_tokens=last, out=out,
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert bool(((out >= 0) & (out < vocab)).all())
