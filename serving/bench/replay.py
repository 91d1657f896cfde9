"""Replays a recorded load against a target, open loop, and looks for the highest good rate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bench.attainment import good_enough, summarise
from serving.bench.runner import PROGRESS_SECONDS
from serving.bench.targets import Target, Times
from serving.config.service import Service, TtftTarget
from serving.errors import OverloadedError
from serving.traces import Trace
from serving.traces.prompts import prompt_tokens, uncached_tokens

#: Lengths of the lone prefills that are timed, as far as they are below the longest. A line between
#: a length and its double is at most an eighth above a time that grows with the square.
OWN_LENGTHS = (16, *(1 << power for power in range(8, 18)))
#: A lone prefill that took longer is not run again.
LONG_PREFILL_S = 20.0
#: From one rate to the next as long as all were good, or all bad.
RATE_STEP = 1.5

Points = list[tuple[int, float]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One request as it is sent. `at` seconds from the start, `own` seconds of its own prefill."""

    at: float
    prompt: NDArray[np.int32]
    tokens_out: int
    own: float
    service: Service


@dataclass(frozen=True)
class Wishes:
    """The targets of all requests; None is none."""

    ttft: TtftTarget | None
    tpot: float | None

    def of(self, tokens: int, own: float, program: str = "") -> Service:
        """A request's targets, that of the TTFT as plain seconds."""
        ttft = None if self.ttft is None else TtftTarget(self.ttft.of(tokens, own))
        return Service(program=program, ttft=ttft, tpot=self.tpot)


async def time_prefills(target: Target, longest: int, vocab_size: int, salt: str) -> Points:
    """(tokens, seconds to the first token) of prompts that are alone, the better of two each."""
    random = np.random.default_rng(11)
    points = []
    for tokens in [*(length for length in OWN_LENGTHS if length < longest), longest]:
        best = math.inf
        for _ in range(2):
            prompt = random.integers(100, vocab_size - 100, tokens).tolist()
            began = asyncio.get_running_loop().time()
            times = await target.ask(prompt, 1, salt=salt)
            best = min(best, times.first - began)
            if best > LONG_PREFILL_S:
                break
        points.append((tokens, best))
    return points


def own_seconds(points: Points, uncached: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds of prefills of so many tokens: on the lines between points, outside as at the end."""
    tokens, seconds = zip(*points, strict=True)
    found: NDArray[np.float64] = np.interp(uncached, tokens, seconds)
    return found


def make_jobs(
    trace: Trace, points: Points, wishes: Wishes, vocab_size: int, page_size: int, seed: int
) -> list[Job]:
    """What is sent for each request of a trace, in its order."""
    own = own_seconds(points, uncached_tokens(trace.requests, page_size)).tolist()
    return [
        Job(
            one.at,
            prompt_tokens(one, index, vocab_size, seed),
            one.tokens_out,
            seconds,
            wishes.of(one.tokens_in, seconds, one.session),
        )
        for index, (one, seconds) in enumerate(zip(trace.requests, own, strict=True))
    ]


async def replay(
    target: Target, jobs: list[Job], *, salt: str = "", name: str = "", say: Say = lambda _: None
) -> dict[str, Any]:
    """`summarise` of one run. Requests are sent when they are due, whatever became of others.

    Times count from when a request was due. A refused one misses its targets; any other failure
    ends the run with an error.
    """
    loop = asyncio.get_running_loop()
    count = _Count(len(jobs), name)
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        reporter = group.create_task(count.report(say))
        running = []
        for job in jobs:
            await asyncio.sleep(max(0.0, began + job.at - loop.time()))
            count.sent += 1
            running.append(group.create_task(_send(target, job, salt, count)))
        await asyncio.wait(running)
        reporter.cancel()
    answers = [task.result() for task in running]
    found = summarise(**_columns(jobs, answers, began))
    return {**found, "wall_s": round(loop.time() - began, 3)}


async def _send(target: Target, job: Job, salt: str, count: _Count) -> Times | None:
    """None when it was refused."""
    try:
        times = await target.ask(job.prompt.tolist(), job.tokens_out, job.service, salt)
    except OverloadedError:
        count.refused += 1
        return None
    count.done += 1
    return times


def _columns(jobs: list[Job], answers: list[Times | None], began: float) -> dict[str, Any]:
    table: dict[str, list[float]] = {
        "arrival": [job.at for job in jobs],
        "tokens_in": [len(job.prompt) for job in jobs],
        "tokens_out": [job.tokens_out for job in jobs],
        "own": [job.own for job in jobs],
        "ttft_target": [
            math.nan if job.service.ttft is None else job.service.ttft.seconds for job in jobs
        ],
        "tpot_target": [math.nan if job.service.tpot is None else job.service.tpot for job in jobs],
    }
    for key in ("ttft", "tpot", "e2e", "longest_gap"):
        table[key] = [math.nan] * len(jobs)
    for place, (job, times) in enumerate(zip(jobs, answers, strict=True)):
        if times is None:
            continue
        table["ttft"][place] = times.first - began - job.at
        table["e2e"][place] = times.last - began - job.at
        table["longest_gap"][place] = times.longest_gap
        table["tpot"][place] = (times.last - times.first) / max(1, job.tokens_out - 1)
    return table


class _Count:
    """Lines such as `conv fcfs 2.0/s: 40 of 180 sent, 31 done, 2 refused`."""

    def __init__(self, total: int, name: str) -> None:
        self._total = total
        self._name = name
        self.sent = self.done = self.refused = 0

    async def report(self, say: Say) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            line = f"{self._name}: {self.sent} of {self._total} sent, {self.done} done"
            say(line + (f", {self.refused} refused" if self.refused else ""))


@dataclass(frozen=True)
class Goodput:
    """The highest rate that was good enough and the lowest that was not, requests a second.

    0 and infinity when no rate was.
    """

    good: float
    bad: float


async def find_goodput(
    run: Callable[[float], Awaitable[dict[str, Any]]], first: float, most: int
) -> Goodput:
    """Bisection over the rate with at most `most` runs; `run` gives the summary of a rate.

    Rates go up or down by RATE_STEP until one was good and one was not, then to the geometric mean
    of the two.
    """
    good, bad, rate = 0.0, math.inf, first
    for _ in range(most):
        if good_enough(await run(rate)):
            good = rate
        else:
            bad = rate
        if bad == math.inf:
            rate = good * RATE_STEP
        elif not good:
            rate = bad / RATE_STEP
        else:
            rate = math.sqrt(good * bad)
    return Goodput(good, bad)
