"""Deaths of stages under a driver that goes on: in every phase, in a row, and too many."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serving.config.engine import ORDERS
from serving.core import Layout, MicroBatch, SamplingParams, StepPlan
from serving.driver.recovery import Deaths, check_progress
from serving.errors import ConfigError, EngineDeadError, LecternError, ModelError
from serving.messages import (
    Abort,
    AllocateKv,
    EngineStats,
    FromStage,
    Ready,
    Recovering,
    StageFailed,
    StageLoaded,
    StageSpec,
    StepOutputs,
    Stop,
    Submit,
    ToStage,
)
from tests.serving.driver.fake import expected_output
from tests.serving.driver.threads import Client, StageThread

#: Plans of the request that every new group does first.
WARM_UP = 3


Message = ToStage | None


class Once:
    """One stage of a group of the given number does something else, at its first message that is
    wanted; `groups` are the directories of the groups that there were.
    """

    def __init__(
        self,
        verdict: str | FromStage,
        when: Callable[[Message], bool],
        *,
        stage: int = 0,
        groups: tuple[int, ...] = (0,),
    ) -> None:
        self.verdict, self.when, self.stage = verdict, when, stage
        self.left = set(groups)
        self.groups: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, spec: StageSpec, message: Message) -> str | FromStage | None:
        with self.lock:
            if spec.directory not in self.groups:
                self.groups.append(spec.directory)
            number = self.groups.index(spec.directory)
            if spec.stage != self.stage or number not in self.left or not self.when(message):
                return None
            self.left.discard(number)
            return self.verdict


def behave(monkeypatch: pytest.MonkeyPatch, how: Callable[..., object]) -> None:
    monkeypatch.setattr(StageThread, "behave", staticmethod(how), raising=False)


def plan_from(number: int, *, prefill: bool) -> Callable[[Message], bool]:
    def when(message: Message) -> bool:
        if not isinstance(message, StepPlan) or message.number < number:
            return False
        return bool(message.prefill_slots if prefill else message.decode_slots)

    return when


def serve(client: Client, streams: range) -> EngineStats:
    """Send requests and wait until all have ended; they must be what they are without any death."""
    for stream in streams:
        client.send(Submit(client.request(stream, [stream, 3, 1, 4, 1, 5], 12)))
    return served(client, streams)


def served(client: Client, streams: range) -> EngineStats:
    stats = client.until(
        lambda one: (
            isinstance(one, EngineStats)
            and one.finished["length"] == len(streams)
            and not one.in_flight
        )
    )
    assert isinstance(stats, EngineStats)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for stream in streams:
        assert client.tokens[stream] == expected_output([stream, 3, 1, 4, 1, 5], params)[0]
        assert client.ended[stream].reason == "length"
    assert stats.prompt_tokens == 6 * len(streams)
    assert stats.generation_tokens == 12 * len(streams)
    assert stats.preemptions == 0
    assert stats.pages_used == 0
    outputs = [one for one in client.seen if isinstance(one, StepOutputs)]
    admitted = [one.stream for output in outputs for one in output.admitted]
    assert sorted(admitted) == list(streams)
    return stats


def recoveries(client: Client) -> list[Recovering]:
    return [one for one in client.seen if isinstance(one, Recovering)]


PHASES = {
    "prefill": plan_from(WARM_UP, prefill=True),
    "decode": plan_from(WARM_UP + 4, prefill=False),
    "late": plan_from(WARM_UP + 14, prefill=False),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("stages", "stage", "verdict"),
    [
        (1, 0, "die"),
        (2, 0, StageFailed(0, "dead", "It broke.")),
        (2, 1, "die"),
        (3, 1, "exit"),
    ],
)
def test_streams_go_on_over_a_death(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    stages: int,
    stage: int,
    verdict: str | FromStage,
) -> None:
    """Eight slots and small micro-batches: some prompts wait, some are half done, some decode."""
    death = Once(verdict, PHASES[phase], stage=stage)
    behave(monkeypatch, death)
    settings = {"pipeline_parallel_size": stages, "max_num_batched_tokens": 16}
    with Client(directory, **settings) as client:
        client.ready()
        stats = serve(client, range(1, 13))
        assert stats.restarts == 1
        (recovering,) = recoveries(client)
        assert recovering.reason.startswith(f"Stage {stage} ")
        assert 0 < recovering.requests <= 12
        first, second = death.groups
        assert Path(first).parent == Path(second).parent == directory
        assert not Path(first).exists()
        assert Path(second).stat().st_mode & 0o777 == 0o700
        client.send(Stop())
        assert client.failure() is None
        assert not Path(second).exists()


def test_a_death_of_idle_stages_is_mended_before_anybody_asks(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, lambda spec, message: None)
    with Client(directory, pipeline_parallel_size=2) as client:
        ready = client.ready()
        client.driver._group.children[1].kill()
        assert client.ready() == ready
        assert recoveries(client) == [Recovering("Stage 1 ended with -9.", 0)]
        assert serve(client, range(1, 5)).restarts == 1
        client.send(Stop())
        assert client.failure() is None


def test_a_stage_that_hangs_is_ended_and_replaced(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, Once("hang", PHASES["decode"], stage=1))
    with Client(directory, pipeline_parallel_size=2, step_timeout=2.0) as client:
        client.ready()
        assert serve(client, range(1, 5)).restarts == 1
        (recovering,) = recoveries(client)
        assert "a stage hangs" in recovering.reason
        client.send(Stop())
        assert client.failure() is None


@pytest.mark.parametrize(
    "when",
    [
        lambda message: message is None,
        lambda message: isinstance(message, AllocateKv),
        lambda message: isinstance(message, StepPlan),
    ],
)
def test_deaths_during_the_restart_are_mended_too(
    directory: Path, monkeypatch: pytest.MonkeyPatch, when: Callable[[Message], bool]
) -> None:
    again = Once("die", when, stage=1, groups=(1, 2))
    first = Once("die", PHASES["decode"])
    behave(monkeypatch, lambda spec, message: again(spec, message) or first(spec, message))
    with Client(directory, pipeline_parallel_size=2) as client:
        client.ready()
        assert serve(client, range(1, 5)).restarts == 3
        told = recoveries(client)
        assert [one.reason for one in told] == [
            f"Stage {stage} ended with -9." for stage in (0, 1, 1)
        ]
        assert len({one.requests for one in told}) == 1
        assert sum(isinstance(one, Ready) for one in client.seen) == 2
        client.send(Stop())
        assert client.failure() is None


def test_too_many_deaths_end_the_engine(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a request that kills whoever computes it."""
    death = Once("die", plan_from(WARM_UP, prefill=True), groups=tuple(range(10)))
    behave(monkeypatch, death)
    with Client(directory) as client:
        client.ready()
        client.send(Submit(client.request(1, [1, 2, 3], 20)))
        failure = client.failure()
    assert isinstance(failure, EngineDeadError)
    assert str(failure) == (
        "The stages ended 4 times within 10 minutes and are not started again. The last time: "
        "Stage 0 ended with -9."
    )
    assert len(death.groups) == 4


def test_deaths_of_long_ago_do_not_count() -> None:
    deaths = Deaths()
    for number in range(20):
        deaths.note("It broke.", 250.0 * number)
    assert deaths.restarts == 20  # never more than three of them within ten minutes
    with pytest.raises(EngineDeadError, match=r"ended 4 times .* The last time: It tore\."):
        deaths.note("It tore.", 250.0 * 19)
    assert deaths.restarts == 20


@pytest.mark.parametrize(
    ("told", "error", "words"),
    [
        (StageFailed(0, "model", "No such tensor."), ModelError, "No such tensor."),
        (StageFailed(0, "config", "Use less.", "--x"), ConfigError, "Use less."),
        (StageLoaded(0, 40, 0, "thread", "fake"), ConfigError, "only 40 KV pages instead of 50"),
    ],
)
def test_what_a_restart_cannot_help_ends_the_engine(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: FromStage,
    error: type[LecternError],
    words: str,
) -> None:
    refusal = Once(told, lambda message: message is None, groups=(1,))
    death = Once("die", PHASES["decode"])
    behave(monkeypatch, lambda spec, message: refusal(spec, message) or death(spec, message))
    with Client(directory, num_kv_pages=None, max_model_len=100) as client:
        assert client.ready().num_pages == 50
        client.send(Submit(client.request(1, [1, 2, 3], 20)))
        failure = client.failure()
    assert isinstance(failure, error)
    assert words in str(failure)
    assert len(refusal.groups) == 2


def test_a_little_less_memory_than_before_will_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(spec: StageSpec, message: Message) -> str | FromStage | None:
        return later(spec, message) or death(spec, message)

    later = Once(StageLoaded(0, 49, 0, "thread", "fake"), lambda one: one is None, groups=(1,))
    death = Once("die", PHASES["decode"])
    behave(monkeypatch, fewer)
    with Client(directory, num_kv_pages=None, max_model_len=100) as client:
        assert client.ready().num_pages == 50
        assert serve(client, range(1, 3)).restarts == 1
        client.send(Stop())
        assert client.failure() is None


def test_who_comes_and_goes_during_the_restart_is_served_and_let_go(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    death = Once("die", PHASES["decode"])
    may_load = threading.Event()
    kinds: list[str] = []

    def slow(spec: StageSpec, message: Message) -> str | FromStage | None:
        verdict = death(spec, message)
        if spec.directory != death.groups[0] and message is None:
            assert may_load.wait(20)
        if isinstance(message, StepPlan) and len(death.groups) == 2:
            kinds.extend(one.params.__class__.__name__ for one in message.admitted)
        return verdict

    behave(monkeypatch, slow)
    with Client(directory) as client:
        client.ready()
        client.send(Submit(client.request(99, [9, 9, 9], 60)))
        client.send(Submit(client.request(1, [1, 3, 1, 4, 1, 5], 12)))
        client.until(lambda one: isinstance(one, Recovering))
        seen = len(client.tokens[99])
        client.send(Abort(99))
        client.send(Submit(client.request(2, [2, 3, 1, 4, 1, 5], 12)))
        client.send(Submit(client.request(98, [8, 8], 60)))
        client.send(Abort(98))
        may_load.set()
        client.ready()
        stats = client.until(
            lambda one: isinstance(one, EngineStats) and one.finished["length"] == 2
        )
        assert isinstance(stats, EngineStats)
        assert stats.finished == {"stop": 0, "length": 2, "abort": 2}
        assert len(client.tokens[99]) == seen
        assert 98 not in client.tokens
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        for stream in (1, 2):
            assert client.tokens[stream] == expected_output([stream, 3, 1, 4, 1, 5], params)[0]
        assert len(kinds) == 3  # one to warm up, and the two that were to go on
        client.send(Stop())
        assert client.failure() is None


def test_who_is_told_to_stop_does_not_mend(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, lambda spec, message: None)
    with Client(directory) as client:
        client.ready()
        driver = client.driver

        def tear(*, wait: bool) -> None:
            driver._stopping = True
            raise EngineDeadError("It tore.")

        monkeypatch.setattr(driver, "_take_results", tear)
        client.send(Submit(client.request(1, [1, 2, 3], 20)))
        assert client.failure() is None
    assert driver._deaths.restarts == 0


def test_new_stages_have_the_layout_of_the_moment(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    death = Once("die", PHASES["decode"])
    specs: list[StageSpec] = []
    epochs: dict[str, set[int]] = {}

    def watch(spec: StageSpec, message: Message) -> str | FromStage | None:
        if message is None:
            specs.append(spec)
        elif isinstance(message, StepPlan):
            epochs.setdefault(spec.directory, set()).add(message.epoch)
        return death(spec, message)

    behave(monkeypatch, watch)
    with Client(directory, pipeline_parallel_size=2) as client:
        client.ready()
        client.driver._migration.layout = Layout(5, [0, 1, 4])
        serve(client, range(1, 3))
        client.send(Stop())
        assert client.failure() is None
    assert [spec.layout for spec in specs] == [Layout.even(4, 2)] * 2 + [Layout(5, [0, 1, 4])] * 2
    assert [epochs[directory] for directory in death.groups] == [{0}, {5}]


@pytest.mark.parametrize("seed", range(6))
def test_any_load_over_deaths_anywhere_gives_what_it_gives_without(
    directory: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    source = np.random.default_rng(seed)
    stages = int(source.integers(1, 4))
    at = {
        number: (int(source.integers(stages)), int(source.integers(60))) for number in range(3)
    }  # which stage of which group dies at which plan
    groups: list[str] = []
    lock = threading.Lock()

    def how(spec: StageSpec, message: Message) -> str | None:
        with lock:
            if spec.directory not in groups:
                groups.append(spec.directory)
            number = groups.index(spec.directory)
        stage, plan = at.get(number, (-1, 0))
        if number == 0:
            plan = max(plan, WARM_UP)
        dies = spec.stage == stage and isinstance(message, StepPlan) and message.number >= plan
        return "die" if dies else None

    behave(monkeypatch, how)
    prompts = {
        stream: source.integers(50, size=source.integers(1, 40)).tolist() for stream in range(1, 25)
    }
    lengths = {stream: int(source.integers(1, 40)) for stream in prompts}
    aborted = set(source.choice(24, 4, replace=False) + 1)
    settings = {
        "pipeline_parallel_size": stages,
        "num_kv_pages": 30,
        "max_num_batched_tokens": int(source.choice([5, 16, 64])),
        "enable_prefix_caching": bool(seed % 2),
        "order": str(source.choice(ORDERS)),
    }
    with Client(directory, **settings) as client:
        client.ready()
        for stream, prompt in prompts.items():
            client.send(Submit(client.request(stream, prompt, lengths[stream])))
            if stream - 3 in aborted:
                client.send(Abort(stream - 3))
        for stream in aborted:
            client.send(Abort(int(stream)))
        stats = client.until(
            lambda one: (
                isinstance(one, EngineStats)
                and sum(one.finished.values()) == len(prompts)
                and not one.in_flight
            )
        )
        assert isinstance(stats, EngineStats)
        for stream, prompt in prompts.items():
            params = SamplingParams(max_tokens=lengths[stream], ignore_eos=True)
            wanted, reason = expected_output(prompt, params)
            given = client.tokens.get(stream, [])
            if stream in aborted:
                assert given == wanted[: len(given)]
            else:
                assert given == wanted
                assert client.ended[stream].reason == reason
        assert stats.restarts == len(groups) - 1 >= 1
        assert stats.pages_used == 0
        client.send(Stop())
        assert client.failure() is None


def test_only_what_was_sent_too_long_ago_hangs() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    batch = MicroBatch(0, nothing, nothing, nothing, nothing)
    check_progress(deque(), 1.0)
    with pytest.raises(EngineDeadError, match="raise --step-timeout"):
        check_progress(deque([batch]), 1.0)
    batch.sent_at = float("inf")
    check_progress(deque([batch]), 1.0)
