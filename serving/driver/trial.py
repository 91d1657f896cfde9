"""What new stages run before they get any work: one short request, and steps to learn times from.

A trial has a scheduler of its own, so that those who wait already do not mix with it; the engine's
scheduler goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import msgspec
import numpy as np

from serving.core import Request, SamplingParams
from serving.driver.completion import Completion
from serving.driver.group import StageGroup
from serving.driver.limits import Limits
from serving.driver.recovery import check_progress
from serving.driver.scheduler import Scheduler
from serving.driver.timings import StepTimings
from serving.messages import DriverSpec, StageStats, StepResult

_WARM_PROMPT, _WARM_TOKENS = 4, 3
_ANSWER = 6  # decodes of each row
_LENGTHS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768)
_CONTEXTS = (16, 256, 1024)
#: A load is left out if this many times its expected duration is not left.
_SPARE = 1.5
_ROUNDS = 8
#: Stages report their times every half second.
_REPORT_SECONDS = 2.0


class Load(msgspec.Struct, frozen=True):
    """`rows` prompts of `length` tokens at once, each with an answer of `answer` tokens."""

    rows: int
    length: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.rows * (self.length + self.answer)


def loads(max_tokens: int, max_seqs: int, max_len: int, max_pages: int, page: int) -> list[Load]:
    """Loads of all sizes that fit, the small ones first: lone chunks of prompts up to `max_tokens`
    and prompts of several chunks, decodes of 1 to `max_seqs` rows over few and many keys.
    """
    chunks = [*_LENGTHS, *range(1024, max_tokens, 512), max_tokens]
    found = [Load(1, length, 1) for length in chunks if length <= max_tokens]
    found += [Load(1, min(max_tokens * more, max_len - 1), 1) for more in (2, 4, 8)]
    sizes = [1 << power for power in range(max_seqs.bit_length())] + [max_seqs]
    found += [Load(rows, length, _ANSWER) for rows in dict.fromkeys(sizes) for length in _CONTEXTS]
    fitting = [
        load
        for load in dict.fromkeys(found)
        if load.length + load.answer <= max_len
        and load.rows * -(-(load.length + load.answer) // page) <= max_pages
    ]
    return sorted(fitting, key=lambda load: load.tokens)


class Trial:
    """Runs requests on a group that has started; `scheduler` is what the stages are left with."""

    def __init__(self, group: StageGroup, spec: DriverSpec, limits: Limits) -> None:
        self._group, self._spec, self._limits = group, spec, limits
        # Prompts are all alike here, and in no hurry.
        config = msgspec.structs.replace(
            spec.config, enable_prefix_caching=False, order="fcfs", max_predicted_ttft=None
        )
        self.scheduler = Scheduler(config, limits.num_pages, limits.max_model_len)
        self.scheduler.epoch = group.layout.epoch
        self._completion = Completion(self.scheduler, spec.eos_token_ids)
        self._streams = count()

    def warm_up(self) -> None:
        """One short request through every stage, prefill and decode."""
        most = self._limits.max_model_len
        length = min(_WARM_PROMPT, most - 1)
        self._run(Load(1, length, min(_WARM_TOKENS, most - length)), None)

    def measure(self, timings: StepTimings, seconds: float) -> int:
        """Teach `timings` from loads of all sizes, for about so many seconds or until every size
        was run often enough; the number of micro-batches.

        Loads that would take longer than what is left are skipped, so a slow machine learns from
        small ones.
        """
        config, limits = self._spec.config, self._limits
        until = time.monotonic() + seconds
        first = self.scheduler.next_number
        known = loads(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            limits.max_model_len,
            limits.num_pages,
            config.page_size,
        )
        for load in self._in_time(known, until):
            self._run(load, timings)
        self._take_reports(timings)
        timings.settle()
        return self.scheduler.next_number - first

    def _in_time(self, known: list[Load], until: float) -> Iterator[Load]:
        """Rounds through the loads, each while there is time for it."""
        pace = 0.0  # seconds a token
        for _ in range(_ROUNDS):
            for load in known:
                began = time.monotonic()
                if began + _SPARE * pace * load.tokens > until:
                    break
                yield load
                pace = (time.monotonic() - began) / load.tokens

    def _run(self, load: Load, timings: StepTimings | None) -> None:
        scheduler, group = self.scheduler, self._group
        prompt = np.zeros(load.length, dtype="<i4").tobytes()
        params = SamplingParams(max_tokens=load.answer, seed=0, ignore_eos=True)
        for stream, _ in zip(self._streams, range(load.rows), strict=False):
            scheduler.submit(
                Request(stream=stream, prompt=prompt, params=params, max_tokens=load.answer),
                time.monotonic(),
            )
        while scheduler.streams or scheduler.in_flight:
            choice = scheduler.choose(time.monotonic())
            if choice is None:
                self._take(timings)
                check_progress(scheduler.in_flight, self._spec.config.step_timeout)
                continue
            batch, plan = choice
            batch.sent_at = time.monotonic()
            group.send_plan(plan)
            if timings is not None:
                timings.sent(batch, scheduler.slots)

    def _take(self, timings: StepTimings | None, seconds: float | None = None) -> None:
        for message in self._group.wait(seconds or self._spec.config.step_timeout):
            if isinstance(message, StepResult):
                self._completion.finish(message)
            elif isinstance(message, StageStats) and timings is not None:
                timings.took(message.stage, message.steps, len(message.steps))

    def _take_reports(self, timings: StepTimings) -> None:
        """Wait for the times of the last micro-batches, but not for a stage that tells none."""
        until = time.monotonic() + _REPORT_SECONDS
        while timings.pending and (left := until - time.monotonic()) > 0:
            self._take(timings, left)
