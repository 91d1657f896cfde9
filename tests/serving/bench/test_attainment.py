"""Figures of a run: small cases by hand, and what holds for every run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bench.attainment import good_enough, jain, summarise

NAN = math.nan


def columns(**given: Any) -> dict[str, Any]:
    """Four requests of one second each, unless told otherwise."""
    row: dict[str, Any] = {
        "arrival": [0.0, 1.0, 2.0, 3.0], "ttft": [1.0, 2.0, 3.0, NAN],
        "tpot": [0.05, 0.2, NAN, NAN], "e2e": [2.0, 4.0, 3.0, NAN],
        "tokens_in": [100, 2000, 9000, 9000], "tokens_out": [21, 11, 1, 50],
        "own": [0.5, 1.0, 1.0, 1.0], "ttft_target": [1.0, 2.0, 2.0, 5.0],
        "tpot_target": [0.1, 0.1, 0.1, 0.1],
    }  # fmt: skip
    return row | given


def test_a_small_run() -> None:
    assert summarise(**columns()) == {
        "n": 4,
        "best_effort": 0,
        "refused": 1,
        "attainment": 0.25,  # the second is slow between tokens, the third comes late
        "attainment_ttft": 0.5,
        "attainment_tpot": 0.5,  # an answer of one token meets it
        "ttft_mean_s": 2.0,
        "ttft_p99_s": 2.98,
        "max_wait_s": 2.0,
        "ttft_p99_longest_5pct_s": 3.0,
        "goodput_req_s": 0.2,  # one in the five seconds until the last token
        "jain": round((2 + 2 + 3) ** 2 / (3 * (4 + 4 + 9)), 6),
        "classes": {
            "<1024": {
                "n": 1, "attainment": 1.0, "ttft_mean_s": 1.0, "ttft_p99_s": 1.0,
                "wait_mean_s": 0.5,
            },
            "1024-8191": {
                "n": 1, "attainment": 0.0, "ttft_mean_s": 2.0, "ttft_p99_s": 2.0,
                "wait_mean_s": 1.0,
            },
            ">=8192": {
                "n": 2, "attainment": 0.0, "ttft_mean_s": 3.0, "ttft_p99_s": 3.0,
                "wait_mean_s": 2.0,
            },
        },
    }  # fmt: skip


def test_best_effort_counts_for_no_share() -> None:
    found = summarise(
        **columns(ttft_target=[1.0, NAN, NAN, NAN], tpot_target=[0.1, NAN, 0.1, NAN]), duration=10.0
    )
    assert found["best_effort"] == 2
    assert (found["attainment"], found["attainment_ttft"]) == (1.0, 1.0)
    assert found["attainment_tpot"] == 1.0
    assert found["goodput_req_s"] == 0.2
    assert found["classes"]["1024-8191"]["attainment"] is None
    assert found["classes"][">=8192"]["attainment"] == 1.0  # by its TPOT alone


def test_what_has_no_request_is_none() -> None:
    nothing = [NAN] * 4
    found = summarise(**columns(ttft=nothing, e2e=nothing, tpot=nothing), longest_gap=nothing)
    assert (found["refused"], found["attainment"], found["goodput_req_s"]) == (4, 0.0, 0.0)
    for key in ("ttft_mean_s", "ttft_p99_s", "max_wait_s", "ttft_p99_longest_5pct_s", "jain"):
        assert found[key] is None
    assert found["longest_gap_p99_s"] is None
    assert found["classes"]["<1024"]["wait_mean_s"] is None
    free = summarise(**columns(ttft_target=nothing, tpot_target=nothing))
    assert (free["attainment"], free["best_effort"]) == (None, 4)
    assert not good_enough(free)


def test_an_answer_that_broke_off_misses() -> None:
    assert summarise(**columns(tpot=[NAN] * 4))["attainment_tpot"] == 0.25


def test_gaps_are_those_of_answers_with_several_tokens() -> None:
    found = summarise(**columns(), longest_gap=[1.0, 1.0, 50.0, NAN])
    assert found["longest_gap_p99_s"] == 1.0


def test_the_longest_twentieth() -> None:
    tokens = np.arange(1, 101)
    found = summarise(
        arrival=np.zeros(100), ttft=tokens / 10, tpot=np.zeros(100), e2e=tokens, tokens_in=tokens,
        tokens_out=tokens, own=np.ones(100), ttft_target=tokens, tpot_target=tokens,
    )  # fmt: skip
    assert found["ttft_p99_longest_5pct_s"] == pytest.approx(np.percentile(tokens[-5:], 99) / 10)


def test_every_array_has_one_entry_a_request() -> None:
    for wrong in ([1.0], [], [[1.0, 2.0, 3.0, 4.0]]):
        with pytest.raises(ValueError, match="one length above 0"):
            summarise(**columns(ttft=wrong))
    with pytest.raises(ValueError, match="one length above 0"):
        summarise(**{name: [] for name in columns()})


def test_jain_of_known_values() -> None:
    assert jain([3.0, 3.0, 3.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5
    assert jain([1e200, 1e200]) == 1.0
    assert jain([]) is None
    assert jain([0.0]) is None


@pytest.mark.parametrize(
    ("overall", "classes", "good"),
    [
        (0.9, {"<1024": 0.95, ">=8192": 0.8}, True),
        (0.899999, {"<1024": 0.95, ">=8192": 0.8}, False),
        (0.95, {"<1024": 1.0, ">=8192": 0.799999}, False),
        (0.95, {"<1024": 0.95, ">=8192": None}, True),
        (None, {}, False),
    ],
)
def test_a_rate_is_good_enough(
    overall: float | None, classes: dict[str, float | None], good: bool
) -> None:
    row = {
        "attainment": overall,
        "classes": {name: {"attainment": share} for name, share in classes.items()},
    }
    assert good_enough(row) is good


seconds = st.floats(0.001, 1000.0)
targets = seconds | st.just(NAN)
requests = st.lists(
    st.fixed_dictionaries(
        {
            "arrival": seconds, "ttft": seconds | st.just(NAN), "tpot": seconds, "e2e": seconds,
            "tokens_in": st.integers(1, 20_000), "tokens_out": st.integers(1, 50), "own": seconds,
            "ttft_target": targets, "tpot_target": targets,
        }
    ),
    min_size=1,
    max_size=30,
)  # fmt: skip


def table(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@settings(max_examples=100, deadline=None)
@given(requests, st.randoms(use_true_random=False))
def test_what_holds_for_every_run(rows: list[dict[str, float]], random: Any) -> None:
    found = summarise(**table(rows))
    shares = [found[key] for key in ("attainment", "attainment_ttft", "attainment_tpot")]
    shares += [part["attainment"] for part in found["classes"].values()]
    assert all(0 <= share <= 1 for share in shares if share is not None)
    assert sum(part["n"] for part in found["classes"].values()) == found["n"] == len(rows)
    classes = len(found["classes"])
    assert found["jain"] is None or 1 / classes - 1e-5 <= found["jain"] <= 1
    met = round((found["attainment"] or 0) * (len(rows) - found["best_effort"]))
    inside = sum(
        round((part["attainment"] or 0) * sum(_wants(row, name) for row in rows))
        for name, part in found["classes"].items()
    )
    assert met == inside
    for kind in ("ttft", "tpot"):
        if all(not math.isnan(row[f"{kind}_target"]) for row in rows):
            assert found["attainment"] <= found[f"attainment_{kind}"]
    # Neither the order of the requests nor the zero of the clock counts.
    random.shuffle(rows)
    again = summarise(**table(rows))
    assert flat(again) == pytest.approx(flat(found), abs=2e-6)


def _wants(row: dict[str, float], name: str) -> bool:
    bounds = {"<1024": (0, 1024), "1024-8191": (1024, 8192), ">=8192": (8192, math.inf)}
    least, beyond = bounds[name]
    free = math.isnan(row["ttft_target"]) and math.isnan(row["tpot_target"])
    return least <= row["tokens_in"] < beyond and not free


def flat(row: dict[str, Any]) -> dict[str, float]:
    parts = {
        f"{name} {key}": value
        for name, part in row["classes"].items()
        for key, value in part.items()
    }
    whole = {**{key: value for key, value in row.items() if key != "classes"}, **parts}
    return {key: -1.0 if value is None else value for key, value in whole.items()}


@settings(max_examples=50, deadline=None)
@given(requests, st.integers(0, 29))
def test_a_refusal_never_raises_a_share(rows: list[dict[str, float]], place: int) -> None:
    before = summarise(**table(rows))
    rows[place % len(rows)]["ttft"] = NAN
    after = summarise(**table(rows))
    for key in ("attainment", "attainment_ttft", "attainment_tpot"):
        assert before[key] is None or after[key] <= before[key]
