"""Order and throttle on their own."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core import Request, SamplingParams, Sequence
from serving.driver.order import make_order
from serving.driver.throttle import Load, even_share, make_throttle


def sequence(order_key: int) -> Sequence:
    tokens = np.array([1, 2, 3], dtype=np.int32)
    request = Request(
        stream=order_key, prompt=tokens.tobytes(), params=SamplingParams(), max_tokens=4
    )
    made = Sequence(request, tokens, 0.0)
    made.order_key = order_key
    return made


def test_first_come_first_served_keeps_the_place_of_the_preempted() -> None:
    order = make_order("fcfs")
    sequences = [sequence(key) for key in range(50)]
    expected: list[int] = []
    source = random.Random(5)
    for item in sequences:
        order.push(item)
        expected.append(item.order_key)
        if source.random() < 0.5:
            victim = sequences[source.choice(expected)]
            order.discard(victim)
            expected.remove(victim.order_key)
    gone = next(item for item in sequences if item.order_key not in expected)
    order.discard(gone)  # discarding what is not there changes nothing
    order.push(gone)
    expected = sorted([*expected, gone.order_key])
    assert [item.order_key for item in order.ranked(0.0)] == expected
    assert len(order) == len(expected)


LOADS = st.builds(
    Load,
    decoding=st.integers(0, 2000),
    ready=st.integers(0, 2000),
    waiting_tokens=st.integers(0, 100_000),
    pages_available=st.integers(0, 1000),
    num_pages=st.just(1000),
    groups=st.integers(1, 8),
    turn=st.integers(0, 1000),
)


@pytest.mark.parametrize("policy", ["classic"])
@given(load=LOADS, max_tokens=st.integers(1, 4096))
def test_a_budget_never_stands_still_while_there_is_work(
    policy: str, load: Load, max_tokens: int
) -> None:
    budget = make_throttle(policy, max_tokens).budget(load)
    assert budget.decode_rows >= 0
    assert budget.prefill_tokens >= 0
    assert budget.decode_rows + budget.prefill_tokens <= max_tokens
    if load.ready or load.waiting_tokens:
        assert budget.decode_rows + budget.prefill_tokens > 0
    if load.ready:
        assert budget.decode_rows > 0


@given(decoding=st.integers(1, 500), groups=st.integers(1, 8), start=st.integers(0, 100))
def test_the_shares_of_one_round_add_up(decoding: int, groups: int, start: int) -> None:
    shares = [
        even_share(Load(decoding, decoding, 0, 0, 0, groups, turn))
        for turn in range(start, start + groups)
    ]
    assert max(shares) - min(shares) <= 1
    if decoding >= groups:
        assert sum(shares) == decoding
