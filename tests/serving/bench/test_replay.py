"""Replays in virtual time: what is measured from when, refusals, the search for goodput."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bench.replay import (
    RATE_STEP,
    Job,
    Wishes,
    find_goodput,
    make_jobs,
    own_seconds,
    replay,
    time_prefills,
)
from serving.bench.targets import BenchError, service_headers
from serving.config.service import Service, TtftTarget, parse_ttft
from serving.traces import Recorded, Trace
from tests.serving.bench.virtual_time import OneByOne, run_virtually

WISHES = Wishes(TtftTarget(2.5), 0.1)


def job(at: float, tokens: int = 2000, tokens_out: int = 3, wishes: Wishes = WISHES) -> Job:
    prompt = np.full(tokens, 7, dtype=np.int32)
    return Job(at, prompt, tokens_out, 1.0, wishes.of(tokens, 1.0))


def test_times_count_from_when_a_request_was_due() -> None:
    async def work() -> tuple[dict[str, Any], OneByOne]:
        target = OneByOne()
        await asyncio.sleep(5.0)  # the zero of the clock is not that of the load
        return await replay(target, [job(0.0), job(1.0), job(2.0)], salt="s"), target

    found, target = run_virtually(work())
    # Two seconds of prefill each, one after the other: 2, 3 and 4 s.
    assert found["ttft_mean_s"] == pytest.approx(3.0)
    assert found["max_wait_s"] == pytest.approx(3.0)
    assert (found["n"], found["refused"]) == (3, 0)
    assert found["attainment_ttft"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["attainment_tpot"] == 1.0
    assert found["longest_gap_p99_s"] == pytest.approx(0.01)
    assert found["wall_s"] == pytest.approx(6.02)
    assert found["goodput_req_s"] == pytest.approx(1 / 6.02, abs=1e-6)
    assert [at for at, *_ in target.asked] == pytest.approx([5.0, 6.0, 7.0])
    for _, prompt, tokens_out, service, salt in target.asked:
        assert (len(prompt), tokens_out, salt) == (2000, 3, "s")
        assert service == Service(ttft=TtftTarget(2.5), tpot=0.1)


def test_answers_of_several_tokens_have_a_tpot() -> None:
    async def work() -> dict[str, Any]:
        jobs = [job(0.0), job(10.0, tokens_out=1), job(20.0, tokens_out=100)]
        return await replay(OneByOne(gap_s=0.2), jobs)

    found = run_virtually(work())
    assert found["attainment_tpot"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["attainment_ttft"] == 1.0


def test_a_refused_request_is_a_miss() -> None:
    async def work() -> dict[str, Any]:
        return await replay(OneByOne(most=1), [job(0.0), job(1.0), job(2.5)])

    found = run_virtually(work())
    assert (found["n"], found["refused"]) == (3, 1)
    assert found["attainment"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["ttft_mean_s"] == pytest.approx(2.0)


def test_all_may_be_refused() -> None:
    async def work() -> dict[str, Any]:
        return await replay(OneByOne(most=0), [job(0.0), job(1.0)])

    found = run_virtually(work())
    assert (found["refused"], found["attainment"], found["ttft_mean_s"]) == (2, 0.0, None)


def test_any_other_failure_ends_the_run() -> None:
    async def work() -> None:
        await replay(OneByOne(broken=5), [job(0.0), job(1.0, tokens=5), job(1000.0)])

    with pytest.raises(ExceptionGroup) as caught:
        run_virtually(work())
    assert caught.group_contains(BenchError)


def test_progress() -> None:
    lines: list[str] = []

    async def work() -> None:
        target = OneByOne(most=2)
        jobs = [job(0.0), job(1.0), job(1.5), job(12.0)]
        await replay(target, jobs, name="conv fcfs", say=lines.append)

    run_virtually(work())
    assert lines == [
        "conv fcfs: 3 of 4 sent, 2 done, 1 refused",
        "conv fcfs: 3 of 4 sent, 2 done, 1 refused",
    ]


def test_lone_prefills_are_timed() -> None:
    async def work() -> tuple[list[tuple[int, float]], OneByOne]:
        target = OneByOne(token_s=0.005)
        return await time_prefills(target, 6000, 500, "s"), target

    points, target = run_virtually(work())
    lengths = [16, 256, 512, 1024, 2048, 4096, 6000]
    assert [tokens for tokens, _ in points] == lengths
    assert [seconds for _, seconds in points] == pytest.approx([0.005 * one for one in lengths])
    # The longest two take too long for a second time.
    asked = [len(prompt) for _, prompt, *_ in target.asked]
    assert asked == sorted([*lengths, *lengths[:5]])
    assert all(one[2] == 1 and one[3] is None and one[4] == "s" for one in target.asked)
    prompts = [tuple(prompt) for _, prompt, *_ in target.asked]
    assert len(set(prompts)) == len(prompts)  # nothing is in a cache
    short = run_virtually(_short())
    assert [tokens for tokens, _ in short] == [9]


async def _short() -> list[tuple[int, float]]:
    return await time_prefills(OneByOne(), 9, 500, "s")


def test_own_time_lies_on_the_lines_between() -> None:
    points = [(10, 1.0), (20, 2.0), (40, 8.0)]
    found = own_seconds(points, np.array([1, 10, 15, 30, 40, 99]))
    assert found.tolist() == [1.0, 1.0, 1.5, 5.0, 8.0, 8.0]


def test_jobs_of_a_trace() -> None:
    requests = [
        Recorded(0.0, 1024, 5, blocks=(1, 2)),
        Recorded(1.5, 1100, 6, blocks=(1, 2, 3), session="run"),
    ]
    trace = Trace("t", requests, shares=True)
    wishes = Wishes(parse_ttft("max(2,5*own)"), None)
    first, second = make_jobs(trace, [(0, 0.0), (2000, 20.0)], wishes, 500, 16, 0)
    assert (first.at, first.tokens_out, len(first.prompt)) == (0.0, 5, 1024)
    assert first.own == pytest.approx(10.24)
    assert first.service.ttft == TtftTarget(pytest.approx(51.2))
    # Its beginning is that of the first: only 76 tokens are its own.
    assert second.own == pytest.approx(0.76)
    assert second.service == Service(program="run", ttft=TtftTarget(pytest.approx(3.8)))
    assert (second.prompt[:1024] == first.prompt).all()
    free = make_jobs(trace, [(0, 0.0)], Wishes(None, None), 500, 16, 0)
    assert free[0].service == Service()


def test_targets_travel_as_headers() -> None:
    assert service_headers(Service()) == {"X-Lectern-TTFT-Ms": "none", "X-Lectern-TPOT-Ms": "none"}
    assert service_headers(Service(program="p", ttft=TtftTarget(2.3456), tpot=0.1)) == {
        "X-Lectern-Program": "p", "X-Lectern-TTFT-Ms": "2345.600", "X-Lectern-TPOT-Ms": "100.000",
    }  # fmt: skip
    assert service_headers(Service(tpot=1e-9))["X-Lectern-TPOT-Ms"] == "0.001"


def summary(good: bool) -> dict[str, Any]:
    return {"attainment": 1.0 if good else 0.5, "classes": {}}


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.integers(1, 12))
def test_goodput_lies_between_what_was_good_and_what_was_not(
    limit: float, first: float, most: int
) -> None:
    tried: list[float] = []

    async def run(rate: float) -> dict[str, Any]:
        tried.append(rate)
        return summary(rate <= limit)

    found = asyncio.run(find_goodput(run, first, most))
    assert tried[0] == first
    assert len(tried) == most
    assert found.good <= limit < found.bad
    assert found.good in (0.0, *tried)
    assert found.bad in (math.inf, *tried)
    bracketed = [found.good > 0, found.bad < math.inf]
    if all(bracketed):
        steps = abs(math.log(first / limit)) / math.log(RATE_STEP)
        halvings = most - 2 - math.floor(steps + 1e-9)
        assert found.bad / found.good <= RATE_STEP ** (0.5 ** max(0, halvings)) * (1 + 1e-9)
    else:
        assert found.good in (0.0, tried[-1])


def test_a_class_left_behind_is_no_goodput() -> None:
    async def run(rate: float) -> dict[str, Any]:
        return {"attainment": 0.95, "classes": {"<1024": {"attainment": 1.0 - rate / 10}}}

    found = asyncio.run(find_goodput(run, 1.0, 8))
    assert found.good <= 2.0 < found.bad
