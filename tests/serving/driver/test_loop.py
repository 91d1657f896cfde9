"""The driver's loop and its stage group: start, serve, tell, fail, end."""

from __future__ import annotations

import io
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from serving.config.engine import EngineConfig, encode_path
from serving.core import Layout, SamplingParams, StepPlan
from serving.driver import __main__ as program
from serving.driver import group, kept_times, loop
from serving.driver.recovery import Deaths
from serving.errors import ConfigError, EngineDeadError, LecternError, ModelError
from serving.messages import (
    Abort,
    AllocateKv,
    DriverSpec,
    EngineStats,
    Failed,
    FromStage,
    Progress,
    Shutdown,
    StageFailed,
    StageProgress,
    StageSpec,
    StageSteps,
    StepOutputs,
    StepPlanned,
    Stop,
    Submit,
    ToStage,
    socket_address,
)
from tests.serving.driver.fake import expected_output
from tests.serving.driver.threads import Client, StageThread

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    behave(monkeypatch, lambda spec, message: None)
    return directory


def behave(monkeypatch: pytest.MonkeyPatch, how: object) -> None:
    monkeypatch.setattr(StageThread, "behave", how, raising=False)


def stats_when(client: Client, wanted: object) -> EngineStats:
    message = client.until(lambda one: isinstance(one, EngineStats) and wanted(one))  # type: ignore[operator]
    assert isinstance(message, EngineStats)
    return message


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 1), (3, 2)])
def test_requests_are_served_and_everything_is_told(
    directory: Path, stages: int, ranks: int
) -> None:
    settings = {"pipeline_parallel_size": stages, "tensor_parallel_size": ranks}
    with Client(directory, **settings) as client:
        ready = client.ready()
        assert (ready.num_pages, ready.max_model_len) == (40, 100)
        for stream in (1, 2, 3):
            client.send(Submit(client.request(stream, [stream, *PROMPT], 6)))
        stats = stats_when(client, lambda one: one.finished["length"] == 3)
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        for stream in (1, 2, 3):
            assert client.tokens[stream] == expected_output([stream, *PROMPT], params)[0]
            assert client.ended[stream].reason == "length"
        assert stats.generation_tokens == 18
        assert stats.in_flight == 0
        batches = [
            batch
            for one in client.seen
            if isinstance(one, EngineStats)
            for batch in one.microbatches
        ]
        assert sum(prefill for _, prefill in batches) == 18
        assert sum(decode for decode, _ in batches) == 15
        texts = [one.text for one in client.seen if isinstance(one, Progress)]
        assert "stage 0 reads" in texts
        # What stages told of their time after the last picture is told in the next one.
        client.send(Submit(client.request(4, PROMPT, 2)))
        stats = stats_when(client, lambda one: one.finished["length"] == 4)
        assert len(stats.stages) == len(stats.prediction_errors) == stages
        client.send(Stop())
        assert client.failure() is None
    assert not kept_times.folder().exists()


@pytest.mark.parametrize("record", [True, False])
def test_steps_are_told_to_the_client_that_wants_them(directory: Path, record: bool) -> None:
    with Client(directory, pipeline_parallel_size=2, record_steps=record) as client:
        client.ready()
        client.send(Submit(client.request(1, PROMPT, 4)))
        stats_when(client, lambda one: one.finished["length"] == 1)
        client.send(Submit(client.request(2, PROMPT, 1)))
        stats_when(client, lambda one: one.finished["length"] == 2)
        client.send(Stop())
        assert client.failure() is None
    planned = [one for one in client.seen if isinstance(one, StepPlanned)]
    told = [one for one in client.seen if isinstance(one, StageSteps)]
    if not record:
        assert not planned
        assert not told
        return
    numbers = [one.number for one in planned]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert [(one.decodes, one.prompt_tokens) for one in planned[:4]] == [
        (0, len(PROMPT)), (1, 0), (1, 0), (1, 0),
    ]  # fmt: skip
    assert {one.epoch for one in planned} == {0}
    for stage in range(2):
        steps = [step for one in told if one.stage == stage for step in one.steps]
        assert {step.number for step in steps} >= set(numbers[:4])
        assert all(step.began == step.number for step in steps)


def test_an_abort_ends_a_request_and_returns_its_pages(directory: Path) -> None:
    with Client(directory) as client:
        client.ready()
        client.send(Submit(client.request(1, PROMPT, 90)))
        client.send(Abort(1))
        stats = stats_when(client, lambda one: one.finished["abort"] == 1 and not one.in_flight)
        assert stats.pages_used == 0
        client.send(Stop())
        assert client.failure() is None


def test_what_would_wait_too_long_is_refused_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that hangs keeps the queue as it is; a token is taken to last 0.1 ms at first."""
    monkeypatch.setattr(Deaths, "most", 0)
    settings = {"max_predicted_ttft": 0.001, "max_num_batched_tokens": 16, "step_timeout": 1.0}
    with Client(directory, **settings) as client:
        client.ready()
        behave(monkeypatch, failing(0, StepPlan, "hang"))
        for stream in range(1, 6):
            client.send(Submit(client.request(stream, [1] * 90, 4)))
        failure = client.failure()
        client.until(lambda one: isinstance(one, StepOutputs) and any(
            refused.stream == 5 for refused in one.refused
        ))  # fmt: skip
    refused = [
        one for message in client.seen if isinstance(message, StepOutputs)
        for one in message.refused
    ]  # fmt: skip
    assert [one.stream for one in refused][-3:] == [3, 4, 5]
    assert 1 not in {one.stream for one in refused}
    for one in refused:
        assert one.ttft > 0.018  # 90 tokens alone take 9 ms, and may wait as long again
        assert one.retry_after == pytest.approx(one.ttft - 0.018)
    assert isinstance(failure, EngineDeadError)
    assert not client.driver._scheduler.streams.keys() & {3, 4, 5}


def failing(stage: int, when: type, verdict: str | FromStage) -> object:
    """One stage does something else at its first message of a kind; `NoneType` is the start."""

    def how(spec: StageSpec, message: ToStage | None) -> str | FromStage | None:
        return verdict if spec.stage == stage and isinstance(message, when) else None

    return how


@pytest.mark.parametrize(
    ("verdict", "error", "words"),
    [
        (StageFailed(1, "config", "Use less.", "--kv-memory"), ConfigError, "Use less."),
        (StageFailed(1, "model", "No such tensor."), ModelError, "No such tensor."),
        (StageFailed(1, "dead", "It broke."), EngineDeadError, "Stage 1 failed: It broke."),
        ("die", EngineDeadError, "Stage 1 ended with -9."),
        ("exit", EngineDeadError, "Stage 1 ended with 3."),
    ],
)
@pytest.mark.parametrize("when", [type(None), AllocateKv, StepPlan])
def test_the_failure_of_a_stage_is_a_sentence_whenever_it_comes(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdict: str | FromStage,
    error: type[LecternError],
    words: str,
    when: type,
) -> None:
    behave(monkeypatch, failing(1, when, verdict))
    with Client(directory, pipeline_parallel_size=2) as client:
        failure = client.failure()
    assert isinstance(failure, error)
    assert str(failure) == words
    if isinstance(failure, ConfigError):
        assert failure.flag == "--kv-memory"


def test_last_words_that_come_after_the_end_are_heard(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process sends before it ends may be read after its end is seen."""
    monkeypatch.setattr(group, "_SETTLE_SECONDS", 5.0)
    threads: list[threading.Thread] = []

    def speak(where: str) -> None:
        time.sleep(0.1)
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(socket_address(where, "results"))
            for said in (StageProgress(0, "reads"), StageFailed(0, "model", "No such tensor.")):
                socket.send(msgspec.msgpack.encode(said))

    def how(spec: StageSpec, message: ToStage | None) -> str:
        threads.append(threading.Thread(target=speak, args=[spec.directory]))
        threads[0].start()
        return "exit"

    behave(monkeypatch, how)
    with Client(directory) as client:
        failure = client.failure()
    threads[0].join()
    assert isinstance(failure, ModelError)
    assert str(failure) == "No such tensor."


@pytest.mark.parametrize("verdict", [StageFailed(0, "dead", "It broke."), "die"])
def test_a_failure_whenever_the_stages_serve_ends_the_driver(
    directory: Path, monkeypatch: pytest.MonkeyPatch, verdict: str | FromStage
) -> None:
    with Client(directory) as client:
        client.ready()
        behave(monkeypatch, failing(0, StepPlan, verdict))
        client.send(Submit(client.request(1, PROMPT, 20)))
        failure = client.failure()
    assert isinstance(failure, EngineDeadError)
    assert "Stage 0" in str(failure)


def test_one_rank_of_several_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(
        monkeypatch,
        lambda spec, message: "die" if spec.rank == 1 and message is not None else None,
    )
    with Client(directory, tensor_parallel_size=2) as client:
        failure = client.failure()
    assert str(failure) == "Rank 1 of stage 0 ended with -9."


def test_a_stage_that_hangs_is_found_out(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deaths, "most", 0)
    with Client(directory, step_timeout=0.3) as client:
        client.ready()
        behave(monkeypatch, failing(0, StepPlan, "hang"))
        client.send(Submit(client.request(1, PROMPT, 20)))
        failure = client.failure()
    assert "a stage hangs" in str(failure)


def test_stages_that_do_not_follow_are_killed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_SHUTDOWN_SECONDS", 0.1)
    with Client(directory, pipeline_parallel_size=2) as client:
        client.ready()
        behave(monkeypatch, failing(0, Shutdown, "hang"))
        client.send(Stop())
        assert client.failure() is None


def test_a_stage_that_takes_no_more_plans_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_QUEUE", 1)
    monkeypatch.setattr(group, "_SEND_MS", 50)
    behave(monkeypatch, lambda spec, message: "hang")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stages = group.StageGroup(driver_spec(directory), Layout.even(4, 1), context, 0)
    plan = StepPlan(number=0, page_ids=bytes(1 << 10))

    def send_for_ever() -> None:
        for _ in range(20_000):
            stages.send_plan(plan)

    with pytest.raises(EngineDeadError, match="Stage 0 takes no more plans"):
        send_for_ever()
    stages.close(orderly=True)
    context.term()


def test_a_stage_that_has_gone_is_found_out_by_sending_too(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, lambda spec, message: "exit")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stages = group.StageGroup(driver_spec(directory), Layout.even(4, 1), context, 0)
    stages.children[0].wait(5)

    def send_for_ever() -> None:
        for number in range(10_000):
            stages.send_plan(StepPlan(number=number))

    with pytest.raises(EngineDeadError, match="Stage 0 ended with 3"):
        send_for_ever()
    stages.close(orderly=False)
    context.term()


def test_a_death_that_nothing_explains_is_a_sentence_too(directory: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stages = group.StageGroup(driver_spec(directory), Layout.even(4, 1), context, 0)
    assert str(stages.failure(None)) == "A stage failed without saying why."
    stages.close(orderly=False)
    context.term()


def test_pages_that_cannot_hold_what_was_asked_for_end_the_start(directory: Path) -> None:
    with Client(directory, num_kv_pages=2, max_model_len=50) as client:
        failure = client.failure()
    assert isinstance(failure, ConfigError)
    assert failure.flag == "--max-model-len"


def test_a_picture_lists_no_more_micro_batches_than_it_may(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MAX_REPORTED_BATCHES", 2)
    with Client(directory) as client:
        client.ready()
        client.send(Submit(client.request(1, PROMPT, 30)))
        stats_when(client, lambda one: one.finished["length"] == 1)
        pictures = [one for one in client.seen if isinstance(one, EngineStats)]
        assert max(len(one.microbatches) for one in pictures) == 2
        client.send(Stop())
        assert client.failure() is None


def driver_spec(directory: Path) -> DriverSpec:
    return DriverSpec(
        config=EngineConfig(model=Path("fake"), threads=1),
        directory=str(directory),
        parent_pid=1,
        layout=Layout.even(4, 1),
        vocab_size=50,
        eos_token_ids=[7],
        context_length=100,
    )


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (None, None),
        (ConfigError("Use less.", "--x"), Failed("Use less.", "config", "--x")),
        (ModelError("No tensor."), Failed("No tensor.", "model")),
        (EngineDeadError("Stage 0 died."), Failed("Stage 0 died.")),
        (ValueError("odd"), Failed("The driver failed: ValueError: odd")),
    ],
)
def test_the_program_says_why_it_ends(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception | None,
    told: Failed | None,
) -> None:
    done: list[object] = []

    class Fake:
        def __init__(self, spec: DriverSpec) -> None:
            assert spec == driver_spec(directory)

        def run(self) -> None:
            if raised is not None:
                raise raised

        def tell(self, message: object) -> None:
            done.append(message)

        def close(self, *, orderly: bool) -> None:
            done.append(orderly)

    monkeypatch.setattr(program, "Driver", Fake)
    monkeypatch.setattr(program, "die_with_parent", lambda pid: done.append(pid))
    encoded = msgspec.json.encode(driver_spec(directory), enc_hook=encode_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(encoded)))
    assert program.main() == (0 if raised is None else 1)
    assert done == [1, *([told] if told else []), raised is None]
