"""The steady throttle: small pieces while little waits, full ones when much does, never nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.driver.throttle import Load, Steady


def _load(decoding: int, waiting: int, ready: int | None = None, groups: int = 1) -> Load:
    return Load(
        decoding=decoding,
        ready=decoding if ready is None else ready,
        waiting_tokens=waiting,
        pages_available=100,
        num_pages=100,
        groups=groups,
        turn=0,
    )


def test_pieces_grow_with_the_queue() -> None:
    throttle = Steady(8192)
    assert throttle.budget(_load(50, 300)).prefill_tokens == 206
    assert throttle.budget(_load(50, 8000)).prefill_tokens == 1000
    assert throttle.budget(_load(50, 1 << 20)).prefill_tokens == 8192 - 50
    assert throttle.budget(_load(900, 10)).prefill_tokens == 64
    assert throttle.budget(_load(0, 300)).prefill_tokens == 8192


@given(st.integers(1, 9000), st.integers(0, 2000), st.integers(0, 1 << 20), st.integers(1, 8))
def test_something_always_goes_on(tokens: int, ready: int, waiting: int, groups: int) -> None:
    budget = Steady(tokens).budget(_load(ready, waiting, groups=groups))
    assert budget.decode_rows <= ready
    assert budget.decode_rows + budget.prefill_tokens <= tokens
    assert budget.decode_rows + budget.prefill_tokens > 0
    assert budget.prefill_tokens > 0 or budget.decode_rows == tokens
