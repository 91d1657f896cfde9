"""Runs a load against a target and sums it up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from serving.bench.loads import Load, workload
from serving.bench.targets import Target
from serving.messages import StageSeconds

#: Seconds between two lines of progress.
PROGRESS_SECONDS = 5.0

Row = tuple[float, float, float, int, int]

_KINDS = ("busy", "wait_input", "wait_link", "idle")


async def run_load(
    target: Target, load: Load, vocab_size: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of one load, as `workload.summary` names them. Raises what a request raises."""
    meter = _Meter(load, progress)
    now = asyncio.get_running_loop().time
    began = now()
    async with asyncio.TaskGroup() as group:
        requests = [
            group.create_task(_request(target, load, index, vocab_size, began, meter))
            for index in range(load.count)
        ]
        reporter = group.create_task(meter.report())
        for request in requests:
            request.add_done_callback(lambda _: meter.count() and reporter.cancel())
    wall = now() - began
    found: dict[str, Any] = workload.summary([request.result() for request in requests], wall)
    return found


def stage_shares(before: list[StageSeconds], after: list[StageSeconds]) -> list[dict[str, float]]:
    """Per cent of each stage's time between two reports that went to work and to waits; of a stage
    that has not reported in between, zeros."""
    shares = []
    for was, now in zip(before, after, strict=False):
        spent = {kind: getattr(now, kind) - getattr(was, kind) for kind in _KINDS}
        total = sum(spent.values()) or 1.0
        shares.append({kind: round(100 * part / total, 1) for kind, part in spent.items()})
    return shares


async def _request(
    target: Target, load: Load, index: int, vocab_size: int, began: float, meter: _Meter
) -> Row:
    tokens_in, tokens_out = load.lengths[index]
    prompt = load.prompt(index, vocab_size)
    now = asyncio.get_running_loop().time
    await asyncio.sleep(max(0.0, began + load.arrivals[index] - now()))
    start = now()
    times = await target.ask(prompt, tokens_out)
    meter.tokens += tokens_in + tokens_out
    tpot = (times.last - times.first) / max(1, tokens_out - 1)
    return (times.first - start, tpot, times.last - start, tokens_in, tokens_out)


class _Meter:
    """Lines such as `chat:200:0: 40 of 200 requests, 1200 tokens/s, about 30 s left`."""

    def __init__(self, load: Load, progress: Callable[[str], None]) -> None:
        self._load = load
        self._progress = progress
        self._began = time.perf_counter()
        self._done = 0
        self.tokens = 0

    def count(self) -> bool:
        """Count a finished request; True when it was the last."""
        self._done += 1
        return self._done == self._load.count

    async def report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            passed = time.perf_counter() - self._began
            line = f"{self._load.text}: {self._done} of {self._load.count} requests"
            total = sum(sum(size) for size in self._load.lengths)
            if self.tokens:
                left = passed * (total - self.tokens) / self.tokens
                line += f", {self.tokens / passed:.0f} tokens/s, about {left:.0f} s left"
            self._progress(line)
