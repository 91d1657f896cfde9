from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.driver.reserve import Reserve

SIZE = 4


def expected(reserve: Reserve, written: int, limit: int, exact: bool = False) -> int:
    return int(reserve.expected(np.array([written]), np.array([limit]), np.array([exact]))[0])


def test_who_runs_to_the_limit_is_known_exactly() -> None:
    reserve = Reserve(SIZE)
    assert expected(reserve, 10, 5000, exact=True) == 4990
    assert expected(reserve, 10, 20) == 10
    assert expected(reserve, 10, 5000) < 600


def test_answers_that_ended_lately_tell_how_long_others_get() -> None:
    reserve = Reserve(SIZE)
    for length in range(1, 1001):
        reserve.note_answer(length % 100 + 1)
    reserve.share = 0.5
    assert abs(expected(reserve, 0, 5000) - 50) <= 2
    assert abs(expected(reserve, 50, 5000) - 25) <= 2
    assert expected(reserve, 200, 5000) == 101  # longer than all: half as long again
    reserve.share = 0.98
    assert abs(expected(reserve, 0, 5000) - 98) <= 2


def test_the_share_follows_preemptions_within_its_limits() -> None:
    reserve = Reserve(SIZE)
    start = reserve.share
    reserve.note_preemption()
    assert reserve.share > start
    for _ in range(100):
        reserve.note_preemption()
    assert reserve.share == reserve.most
    for _ in range(1000):
        reserve.note_micro_batch()
    assert reserve.share == reserve.least


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=12),
)
def test_the_worst_moment_is_that_of_a_run_token_by_token(
    sequences: list[tuple[int, int]],
) -> None:
    """Each (tokens written, tokens left): write one each a round and count pages."""
    held = np.array([-(-written // SIZE) for written, _ in sequences], dtype=np.int64)
    left = np.array([more for _, more in sequences], dtype=np.int64)
    worst = 0
    for rounds in range(1, 61):
        worst = max(
            worst,
            sum(-(-(written + rounds) // SIZE) for written, more in sequences if more >= rounds),
        )
    needed = Reserve(SIZE).needed(held, left)
    assert needed >= 0
    exact = max(0, worst - int(held.sum()))
    # Each sequence's last page is counted as half full, and the root of their number added.
    assert exact - len(sequences) <= needed <= exact + 2 * len(sequences)
