"""A pipeline of stages in virtual time, driven by the engine's scheduler and completion.

Stages work in the order of the plans, so the way of a micro-batch through all of them is known
as soon as it is planned: no event queue is needed beyond arrivals and results.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from struct import iter_unpack, pack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.config.engine import EngineConfig
from serving.config.service import Service
from serving.core import Layout, MicroBatch, Request, SamplingParams
from serving.driver.completion import Completion
from serving.driver.predictor import StepFeatures
from serving.driver.scheduler import Scheduler
from serving.errors import ConfigError
from serving.messages import StageSeconds, StepResult
from serving.simulation.profile import Profile

_EOS_ID = 0
_EOS, _WORD = pack("<i", _EOS_ID), pack("<i", 1)
_BEST_EFFORT = Service()


@dataclass(frozen=True)
class BlockChain:
    """`numbers` (int64) of a prompt's blocks of `size` tokens: any two blocks have the same number
    if they are equal and so is all before them, and only then.
    """

    numbers: NDArray[np.int64]
    size: int

    def page_keys(self, page_size: int, count: int) -> list[bytes]:
        """Keys of the first `count` pages, as good as the hashes that an engine has to reckon."""
        if self.size % page_size:
            return []
        pages = self.size // page_size
        keys = np.zeros((count, 2), dtype=np.int64)
        keys[:, 0] = (self.numbers[:, None] * pages + np.arange(pages)).ravel()[:count]
        return [key for (key,) in iter_unpack("16s", keys.tobytes())]


@dataclass(frozen=True)
class Arrival:
    """A request: seconds from the start, prompt ids (int32), tokens of the answer, the blocks of
    the prompt where they are known, its targets, and the seconds of its own uncached prefill.
    """

    at: float
    prompt: NDArray[np.int32]
    tokens_out: int
    chain: BlockChain | None = None
    service: Service = _BEST_EFFORT
    own: float = math.nan


@dataclass
class Step:
    """One micro-batch: its features, its layout's epoch, when each stage began and ended it."""

    number: int
    features: StepFeatures
    epoch: int
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """Times in seconds by request: first token, last token, counted from the arrival."""

    first: NDArray[np.float64]
    last: NDArray[np.float64]
    wall: float
    steps: int
    preemptions: int
    cached_tokens: int
    decode_tokens: int
    prefill_tokens: int
    stages: list[StageSeconds]


#: Changes a stage's seconds: (stage, time, seconds) -> seconds.
Slowdown = Callable[[int, float, float], float]


class Pipeline:
    """`run` serves requests to the end. `known_lengths`: requests ignore the end-of-sequence token,
    as the bench's do; else each may have `longest_answer` tokens and stops by itself earlier.
    """

    def __init__(
        self,
        profile: Profile,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        known_lengths: bool = True,
        longest_answer: int = 4096,
        slowdown: Slowdown | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.profile = profile
        self.layout = layout_of(profile, config)
        self.scheduler = Scheduler(config, num_pages, max_model_len, self._slowest)
        self._completion = Completion(self.scheduler, [_EOS_ID])
        self._known_lengths = known_lengths
        self._longest_answer = longest_answer
        self._max_model_len = max_model_len
        self._slowdown = slowdown
        self._on_step = on_step
        stages = config.pipeline_parallel_size
        self._free_at = [0.0] * stages
        self._stages = [StageSeconds() for _ in range(stages)]
        self._sampled_in = np.full(config.max_num_seqs, -1, dtype=np.int64)
        self._token_at: dict[int, float] = {}
        self._results: deque[tuple[float, MicroBatch]] = deque()
        self._steps = self._decodes = self._prefills = 0

    def run(
        self, arrivals: list[Arrival], progress: Callable[[int, float], None] | None = None
    ) -> Outcome:
        """Serve all arrivals, sorted by time; `progress` is told ended requests and the time."""
        count = len(arrivals)
        self._first = np.full(count, np.nan)
        self._last = np.full(count, np.nan)
        self._tokens_out = np.array([one.tokens_out for one in arrivals], dtype=np.int64)
        times = [one.at for one in arrivals]
        at = np.array(times)
        scheduler = self.scheduler
        now, arrived = 0.0, 0
        self._ended = 0
        while self._ended < count:
            while arrived < count and times[arrived] <= now:
                self._submit(arrived, arrivals[arrived])
                arrived += 1
            choice = scheduler.choose(now)
            scheduler.admitted.clear()
            if choice is not None:
                now += self.profile.plan_s
                self._send(choice[0], now)
            else:
                coming = times[arrived] if arrived < count else math.inf
                if self._results:
                    coming = min(coming, self._results[0][0])
                if coming == math.inf:
                    raise AssertionError("work is queued and nothing runs")
                now = max(now, coming)
            while self._results and self._results[0][0] <= now:
                self._finish(*self._results.popleft())
                if progress is not None:
                    progress(self._ended, now)
        counters = scheduler.counters
        return Outcome(
            first=self._first - at,
            last=self._last - at,
            wall=float(self._last.max()),
            steps=self._steps,
            preemptions=counters.preemptions,
            cached_tokens=counters.cached_prompt_tokens,
            decode_tokens=self._decodes,
            prefill_tokens=self._prefills,
            stages=self._stages,
        )

    def _submit(self, index: int, arrival: Arrival) -> None:
        room = self._max_model_len - len(arrival.prompt)
        most = arrival.tokens_out if self._known_lengths else min(self._longest_answer, room)
        pages = -(-(len(arrival.prompt) + most) // self.scheduler.page_size)
        if most > room or arrival.tokens_out > room or pages > self.scheduler.pool.num_pages:
            raise ConfigError(
                f"A request of {len(arrival.prompt)} tokens and {most} more does not fit; raise "
                "--max-model-len or --num-kv-pages.",
                "--max-model-len",
            )
        params = SamplingParams(max_tokens=most, seed=0, ignore_eos=self._known_lengths)
        request = Request(
            stream=index,
            prompt=arrival.prompt.tobytes(),
            params=params,
            max_tokens=most,
            service=arrival.service,
        )
        scheduler = self.scheduler
        keys: list[bytes] = []
        if scheduler.caching and arrival.chain is not None:
            full = (len(arrival.prompt) - 1) // scheduler.page_size
            keys = arrival.chain.page_keys(scheduler.page_size, full)
        scheduler.submit(request, arrival.at, keys)

    def _slowest(self, features: StepFeatures) -> float:
        """Seconds of the slowest stage, as the driver would predict them."""
        layout, last = self.layout, self.layout.num_stages - 1
        slowest = self.profile.stage_seconds(features, len(layout.layers(last)), last=True)
        for stage in range(last):
            seconds = self.profile.stage_seconds(features, len(layout.layers(stage)), last=False)
            slowest = max(slowest, seconds)
        return slowest

    def _send(self, batch: MicroBatch, now: float) -> None:
        """Let a micro-batch go through all stages."""
        profile = self.profile
        features = StepFeatures.of(batch, self.scheduler.slots)
        reads = -1
        if len(batch.decode_slots):
            reads = int(np.maximum.reduce(self._sampled_in[batch.decode_slots]))
        self._sampled_in[batch.sampled] = batch.number
        told = now + profile.news_s
        there = self._token_at.get(reads, 0.0) + profile.token_return_s
        step = None if self._on_step is None else Step(batch.number, features, self.layout.epoch)
        last = len(self._free_at) - 1
        tokens = features.new_tokens + features.decode_rows
        for stage, free in enumerate(self._free_at):
            began = max(told, free, there)
            seconds = profile.stage_seconds(
                features, len(self.layout.layers(stage)), last=stage == last
            )
            if self._slowdown is not None:
                seconds = self._slowdown(stage, began, seconds)
            spent = self._stages[stage]
            spent.idle += max(0.0, told - free)
            spent.wait_input += began - max(told, free)
            spent.busy += seconds
            ended = self._free_at[stage] = began + seconds
            if step is not None:
                step.began.append(began)
                step.ended.append(ended)
            there = ended + profile.link_s + profile.link_token_s * tokens
        self._token_at[batch.number] = ended
        self._token_at.pop(batch.number - 4 * self.scheduler.depth, None)
        self._results.append((ended + profile.news_s, batch))
        self._steps += 1
        self._decodes += features.decode_rows
        self._prefills += features.new_tokens
        if step is not None and self._on_step is not None:
            self._on_step(step)

    def _finish(self, at: float, batch: MicroBatch) -> None:
        slots = self.scheduler.slots
        sampled = batch.sampled
        tokens = _WORD * len(sampled)
        if not self._known_lengths:
            written = slots.known[sampled] - slots.prompt_len[sampled]
            over = written >= self._tokens_out[slots.stream[sampled]]
            tokens = b"".join([_EOS if stops else _WORD for stops in over.tolist()])
        result = StepResult(number=batch.number, tokens=tokens)
        _, outputs = self._completion.finish(result)
        if len(batch.prefill_slots):  # else nobody's first token is among them
            streams = np.frombuffer(outputs.streams, dtype="<i8")
            new = streams[np.isnan(self._first[streams])]
            self._first[new] = at
        for ended in outputs.ended:
            self._last[ended.stream] = at
            self._ended += 1


def layout_of(profile: Profile, config: EngineConfig) -> Layout:
    counts, stages = config.layer_layout, config.pipeline_parallel_size
    if stages > profile.layers:
        raise ConfigError(
            f"{profile.name} has only {profile.layers} layers for {stages} stages.", "--stages"
        )
    if counts is not None and sum(counts) != profile.layers:
        raise ConfigError(
            f"--layer-layout must share out the {profile.layers} layers of {profile.name} among "
            f"{stages} stages, at least one each, not {counts}.",
            "--layer-layout",
        )
    return Layout.even(profile.layers, stages) if counts is None else Layout.of_counts(counts)


def simulated_config(stages: int, **settings: Any) -> EngineConfig:
    """Settings of an engine that has no model."""
    return EngineConfig(
        model=Path("simulated"),
        pipeline_parallel_size=stages,
        **settings,
    )
