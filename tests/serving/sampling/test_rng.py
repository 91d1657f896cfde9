"""The numbers themselves: fixed, uniform, and a function of seed, choice and position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.sampling import stream_key, uniforms

KEYS = st.integers(0, 2**64 - 1)


def _numbers(seed: int, choice: int, positions: range) -> np.ndarray:
    keys = np.full(len(positions), stream_key(seed, choice), dtype=np.uint64)
    return uniforms(keys, np.asarray(positions))


def _by_hand(key: int, position: int) -> float:
    """SplitMix64's output function in plain integers."""
    mask = 2**64 - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (((z ^ (z >> 31)) >> 11) + 0.5) / 2**53


def test_the_generator_is_splitmix64() -> None:
    # With key 0 the numbers are those of the published generator seeded with 0.
    first = (0xE220A8397B1DCDAF >> 11) + 0.5
    assert uniforms(np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.int64))[0] == first / 2**53


@given(key=KEYS, position=st.integers(0, 2**31))
def test_vector_and_integers_agree(key: int, position: int) -> None:
    number = uniforms(np.array([key], dtype=np.uint64), np.array([position]))[0]
    assert number == _by_hand(key, position)
    assert 0.0 < number < 1.0


@given(keys=st.lists(KEYS, min_size=2, max_size=20), position=st.integers(0, 10**6))
def test_neighbours_do_not_matter(keys: list[int], position: int) -> None:
    many = uniforms(np.array(keys, dtype=np.uint64), np.full(len(keys), position))
    for key, number in zip(keys, many, strict=True):
        assert number == uniforms(np.array([key], dtype=np.uint64), np.array([position]))[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -5])
def test_numbers_are_uniform_and_streams_unrelated(seed: int) -> None:
    one = _numbers(seed, 0, range(20_000))
    counts = np.histogram(one, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 100  # chi-square, 49 degrees, p about 2e-5
    for other in (_numbers(seed, 1, range(20_000)), _numbers(seed + 1, 0, range(20_000))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_small_seeds_choices_and_positions_never_share_a_number() -> None:
    numbers = [_numbers(seed, choice, range(30)) for seed in range(30) for choice in range(8)]
    assert len(np.unique(np.concatenate(numbers))) == 30 * 8 * 30
