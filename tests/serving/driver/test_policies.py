"""Order and throttle on their own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config.engine import EngineConfig
from serving.core import Request, SamplingParams, Sequence
from serving.driver.order.fcfs import FirstComeFirstServed
from serving.driver.throttle import Budget, Load, Throttle, TokenThrottle, even_share, make_throttle


def sequence(order_key: int) -> Sequence:
    tokens = np.array([1, 2, 3], dtype=np.int32)
    request = Request(
        stream=order_key, prompt=tokens.tobytes(), params=SamplingParams(), max_tokens=4
    )
    made = Sequence(request, tokens, 0.0)
    made.order_key = order_key
    return made


def test_first_come_first_served_keeps_the_place_of_the_preempted() -> None:
    order = FirstComeFirstServed()
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
    entered_tokens=st.integers(0, 100_000),
    pages_reserved=st.integers(0, 3000),
)


def throttle(policy: str, max_tokens: int) -> Throttle:
    return make_throttle(
        EngineConfig(
            model=Path("m"),
            schedule_policy=policy,  # type: ignore[arg-type]
            max_num_batched_tokens=max_tokens,
        )
    )


@pytest.mark.parametrize("policy", ["classic", "steady", "throttle"])
@given(load=LOADS, max_tokens=st.integers(1, 4096))
def test_a_budget_never_stands_still_while_there_is_work(
    policy: str, load: Load, max_tokens: int
) -> None:
    budget = throttle(policy, max_tokens).budget(load)
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


def load(
    waiting: int, *, decoding: int = 40, available: int = 1000, reserved: int = 0, entered: int = 0
) -> Load:
    return Load(
        decoding=decoding,
        ready=decoding // 4,
        waiting_tokens=waiting,
        pages_available=available,
        num_pages=1000,
        groups=4,
        turn=0,
        entered_tokens=entered,
        pages_reserved=reserved,
    )


def test_throttle_keeps_the_pace_of_a_queue_until_it_is_empty() -> None:
    policy = TokenThrottle(4096, spread=8, floor=64)
    assert policy.budget(load(2048)) == Budget(10, 256)
    assert policy.budget(load(1792)).prefill_tokens == 256
    assert policy.budget(load(4 * 2048)).prefill_tokens == 512
    assert policy.budget(load(1)).prefill_tokens == 512
    policy.budget(load(0))
    assert policy.budget(load(1)).prefill_tokens == 54  # fills up to the floor


def test_throttle_takes_fewer_prompt_tokens_as_pages_run_out_and_none_against_the_reserve() -> None:
    def prefill(**settings: int) -> int:
        return TokenThrottle(2048, spread=1, floor=64).budget(load(2048, **settings)).prefill_tokens

    assert prefill() == 2048 - 10
    assert prefill(available=500) == 1024
    assert prefill(available=500, reserved=400) == 2048 * 100 // 600
    assert prefill(available=401, reserved=400) == 54  # there is room: never below the floor
    assert prefill(available=400, reserved=400) == 0
    assert prefill(available=400, reserved=400, entered=300) == 54
    assert prefill(available=0, reserved=3000) == 0
    assert prefill(available=0, reserved=3000, decoding=0) == 64


def test_auto_means_throttle_for_several_stages() -> None:
    one, four = (EngineConfig(model=Path("m"), pipeline_parallel_size=n) for n in (1, 4))
    assert (one.policy, four.policy) == ("classic", "throttle")
    assert EngineConfig(model=Path("m"), schedule_policy="steady").policy == "steady"
