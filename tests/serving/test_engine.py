"""The engine with its real processes: life, death, aborts, and a mixed load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from serving.config.engine import EngineConfig
from serving.config.service import Service, TtftTarget
from serving.core import SamplingParams, TokenOutput
from serving.engine import Engine
from serving.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    ModelError,
    OverloadedError,
)
from serving.messages import Recovering
from tests.serving.processes import children_of, eventually, gone
from tests.serving.tiny import make_checkpoint

Start = Callable[..., Awaitable[Engine]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "llama", "llama")


@pytest.fixture
async def start(checkpoint: Path) -> AsyncIterator[Start]:
    """Start an engine on the small checkpoint; it is closed afterwards."""
    engines: list[Engine] = []

    async def make(**settings: object) -> Engine:
        defaults: dict[str, object] = {
            "model": checkpoint,
            "pipeline_parallel_size": 2,
            "dtype": "float32",
            "num_kv_pages": 128,
            "max_num_seqs": 32,
            "threads": 1,
        }
        engine = await Engine.start(EngineConfig(**(defaults | settings)))  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


async def collect(stream: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    return [output async for output in stream]


async def settled(engine: Engine, requests: int) -> None:
    """Wait for the picture that the driver sends when the last of so many requests ended."""
    for _ in range(500):
        stats = engine.stats
        busy = stats.running or stats.waiting or stats.in_flight or stats.pages_used
        if sum(stats.finished.values()) == requests and not busy:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"the engine did not come to rest: {engine.stats}")


async def test_a_crowd_is_refused_in_part_and_the_rest_is_served(start: Start) -> None:
    """Beyond the limit requests end with a time to come back, before they were scheduled."""
    engine = await start(
        order="slo", max_predicted_ttft=0.02, max_num_batched_tokens=16, max_model_len=256
    )
    service = Service(ttft=TtftTarget(1.0), tpot=0.5, tenant="one")

    async def ask(number: int) -> list[TokenOutput] | OverloadedError:
        prompt = [(number + 3 * place) % 90 + 1 for place in range(200)]
        try:
            return await collect(engine.generate(prompt, greedy(3), service=service))
        except OverloadedError as error:
            return error

    found = await asyncio.gather(*(ask(number) for number in range(24)))
    refused = [one for one in found if isinstance(one, OverloadedError)]
    served = [one for one in found if not isinstance(one, OverloadedError)]
    assert refused
    assert served
    assert all(one.retry_after > 0 and "send the request again" in str(one) for one in refused)
    assert all(sum(len(output.token_ids) for output in one) == 3 for one in served)
    await settled(engine, len(served))
    assert (await collect(engine.generate([1, 2, 3], greedy(2))))[-1].finish_reason == "length"


async def test_outputs_say_queued_then_scheduled_then_tokens(start: Start) -> None:
    engine = await start()
    outputs = await collect(engine.generate([1, 2, 3], greedy(5)))
    assert outputs[0].queued
    assert not outputs[0].token_ids
    assert not any(output.queued for output in outputs[1:])
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]


async def test_what_cannot_be_served_is_refused_at_the_door(start: Start) -> None:
    engine = await start(num_kv_pages=8)
    assert engine.max_model_len == 128
    vocab = engine.model_config.vocab_size
    for prompt in ([], [vocab], [-1], [1, vocab + 5]):
        with pytest.raises(InvalidRequestError, match=r"prompt|token") as refused:
            engine.generate(prompt, greedy(4))
        assert refused.value.param == "prompt"
    with pytest.raises(ContextLengthError, match="128") as too_long:
        engine.generate([1] * 128, greedy(1))
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(ContextLengthError, match="max_tokens is 29"):
        engine.generate([1] * 100, greedy(29))
    with pytest.raises(InvalidRequestError, match="temperature"):
        engine.generate([1], SamplingParams(temperature=-1.0))
    # What passes the door is finished, even when it needs every page.
    outputs = await collect(engine.generate([1] * 100, greedy(28)))
    assert sum(len(output.token_ids) for output in outputs) == 28
    unlimited = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    outputs = await collect(engine.generate([1] * 100, unlimited))
    assert sum(len(output.token_ids) for output in outputs) == 28


async def test_leaving_a_stream_ends_the_work_and_returns_the_pages(start: Start) -> None:
    engine = await start(enable_prefix_caching=False)
    stream = engine.generate([5, 6, 7], greedy(400))
    async for output in stream:
        if output.token_ids:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    await settled(engine, 1)
    assert engine.stats.finished["abort"] == 1
    assert engine.stats.pages_free == 128
    assert engine.stats.generation_tokens < 400


def stages_of() -> list[psutil.Process]:
    """The stages of the one engine of this process, first to last."""
    return sorted(children_of(os.getpid(), "serving.stage"), key=lambda process: process.pid)


class Load:
    """Streams of many kinds, and what each gave: tokens, log probabilities, reason.

    Two thirds of them wait for a slot at first; some prompts share their beginnings.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens = 0
        self.some = asyncio.Event()

    async def stream(self, number: int) -> tuple[list[int], list[int], str | None]:
        prompt = [number % 3 + 1] * 40 + [(7 * number + 3 * place) % 250 for place in range(60)]
        params = SamplingParams(
            max_tokens=60 + 5 * number,
            min_tokens=30,
            temperature=0.0 if number % 2 else 1.0,
            seed=number,
            repetition_penalty=1.2 if number % 3 == 0 else 1.0,
            frequency_penalty=0.5 if number % 4 == 0 else 0.0,
            logprobs=2 if number % 5 == 0 else None,
        )
        given: list[int] = []
        logprobs: list[int] = []
        reason = None
        async for output in self.engine.generate(prompt, params):
            given += output.token_ids
            logprobs += [one.token_id for one in output.logprobs or []]
            reason = output.finish_reason
            self.tokens += len(output.token_ids)
            if self.tokens > 300:
                self.some.set()
        assert logprobs == (given if params.logprobs is not None else [])
        return given, logprobs, reason

    def begin(self) -> asyncio.Future[list[tuple[list[int], list[int], str | None]]]:
        return asyncio.gather(*(self.stream(number) for number in range(12)))


LOAD = {"max_num_seqs": 4, "max_num_batched_tokens": 48}


@pytest.mark.parametrize("stage", [0, 1])
async def test_streams_go_on_over_the_kill_of_a_stage(start: Start, stage: int) -> None:
    engine = await start(**LOAD)
    undisturbed = await Load(engine).begin()
    await settled(engine, 12)
    load = Load(engine)
    running = load.begin()
    await load.some.wait()
    before = stages_of()
    recoveries: list[Recovering | None] = []
    engine.on_recovery = recoveries.append
    before[stage].kill()
    assert await asyncio.wait_for(running, 60) == undisturbed
    assert engine.state == "ready"
    assert engine.reason == ""
    (recovering, done) = recoveries
    assert recovering is not None
    assert recovering.reason == f"Stage {stage} was killed by signal 9 (SIGKILL)."
    assert 4 <= recovering.requests <= 12
    assert done is None
    assert gone(before)
    assert len(stages_of()) == 2
    await settled(engine, 24)
    stats = engine.stats
    assert stats.restarts == 1
    assert stats.prompt_tokens == 2 * 12 * 100
    assert stats.finished["abort"] == stats.pages_used == 0


async def test_a_kill_during_the_recovery_and_requests_that_come_meanwhile(start: Start) -> None:
    engine = await start(**LOAD)
    undisturbed = await Load(engine).begin()
    alone = await collect(engine.generate([1, 2], greedy(5)))
    load = Load(engine)
    running = load.begin()
    await load.some.wait()
    told: asyncio.Queue[Recovering | None] = asyncio.Queue()
    engine.on_recovery = told.put_nowait
    before = stages_of()
    before[1].kill()
    assert await told.get() is not None
    assert engine.state == "recovering"
    assert "killed by signal 9" in engine.reason
    late = asyncio.create_task(collect(engine.generate([1, 2], greedy(5))))
    left = engine.generate([3, 4], greedy(400))
    assert (await anext(left)).queued  # type: ignore[call-overload]
    await left.aclose()  # type: ignore[attr-defined]
    while not (new := [one for one in stages_of() if one not in before]):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    new[0].kill()
    assert await told.get() is not None
    assert await told.get() is None
    assert await asyncio.wait_for(running, 60) == undisturbed
    assert [t for o in await late for t in o.token_ids] == [t for o in alone for t in o.token_ids]
    await settled(engine, 27)
    assert engine.stats.restarts == 2
    assert engine.stats.finished["abort"] == 1


async def test_close_during_a_recovery_ends_everything(start: Start) -> None:
    engine = await start()
    running = asyncio.create_task(collect(engine.generate([1, 2, 3], greedy(480))))
    told = asyncio.Event()
    engine.on_recovery = lambda one: told.set()
    before = stages_of()
    before[0].kill()
    await asyncio.wait_for(told.wait(), 20)
    while not (new := [one for one in stages_of() if one not in before]):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    new[0].send_signal(signal.SIGSTOP)  # it will never have loaded
    drivers = children_of(os.getpid(), "serving.driver")
    directory = engine._directory
    started = time.monotonic()
    await engine.close()
    assert time.monotonic() - started < 5
    with pytest.raises(EngineDeadError, match="closed"):
        await running
    assert eventually(lambda: gone([*new, *drivers]))
    assert not stages_of()
    assert directory is not None
    assert not directory.exists()


async def test_kill_of_the_driver_ends_stages_and_streams_and_a_restart_serves_again(
    start: Start,
) -> None:
    engine = await start()
    before = await collect(engine.generate([1, 2], greedy(5)))
    stages = stages_of()
    (driver,) = children_of(os.getpid(), "serving.driver")
    running = asyncio.create_task(collect(engine.generate([1, 2, 3], greedy(480))))
    await asyncio.sleep(0.1)
    driver.kill()
    with pytest.raises(EngineDeadError, match="driver process was killed by signal 9"):
        await asyncio.wait_for(running, 10)
    assert engine.state == "dead"
    assert "killed" in await engine.wait_dead()
    with pytest.raises(EngineDeadError):
        engine.generate([1], greedy(2))
    assert eventually(lambda: gone(stages))
    await engine.restart()
    assert engine.state == "ready"
    after = await collect(engine.generate([1, 2], greedy(5)))
    assert [t for o in after for t in o.token_ids] == [t for o in before for t in o.token_ids]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.full)])
async def test_streams_go_on_over_a_stage_that_hangs(start: Start, stage: int) -> None:
    engine = await start(step_timeout=2.0, **LOAD)
    undisturbed = await Load(engine).begin()
    load = Load(engine)
    running = load.begin()
    await load.some.wait()
    before = stages_of()
    recoveries: list[Recovering | None] = []
    engine.on_recovery = recoveries.append
    before[stage].send_signal(signal.SIGSTOP)
    assert await asyncio.wait_for(running, 60) == undisturbed
    assert recoveries[0] is not None
    assert "a stage hangs" in recoveries[0].reason
    assert gone(before)


async def test_close_ends_even_stages_that_hang(start: Start) -> None:
    engine = await start()
    processes = children_of(os.getpid(), "serving.stage")
    processes += children_of(os.getpid(), "serving.driver")
    directory = engine._directory
    assert directory is not None
    assert directory.stat().st_mode & 0o777 == 0o700
    for process in processes[:2]:
        process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    await engine.close()
    assert time.monotonic() - started < 8
    assert gone(processes)
    assert not directory.exists()
    assert engine.state == "dead"
    with pytest.raises(EngineDeadError, match="closed"):
        engine.generate([1], greedy(2))


PARENT = """
import asyncio, sys
from pathlib import Path
from serving.config.engine import EngineConfig
from serving.engine import Engine

async def main():
    await Engine.start(EngineConfig(model=Path(sys.argv[1]), pipeline_parallel_size=2, threads=1,
                                    num_kv_pages=16))
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_kill_of_the_parent_leaves_nothing(checkpoint: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        processes = children_of(parent.pid, "serving.stage")
        processes += children_of(parent.pid, "serving.driver")
        assert len(processes) == 3
        for process in processes:
            addresses = process.net_connections(kind="inet")
            assert all(item.laddr.ip in ("127.0.0.1", "::1") for item in addresses)
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
    assert eventually(lambda: gone(processes))


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with a weight file that ends too early."""
    for file in checkpoint.iterdir():
        kept = 5000 if "safetensors" in file.name else None
        (tmp_path / file.name).write_bytes(file.read_bytes()[:kept])
    return tmp_path


async def test_a_start_that_fails_says_why_and_leaves_nothing(
    start: Start, damaged: Path, tmp_path: Path
) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ModelError):
        await start(model=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="only 4 layers") as too_many:
        await start(pipeline_parallel_size=5)
    assert too_many.value.flag == "--pipeline-parallel-size"
    with pytest.raises(ConfigError, match="adds up to 3"):
        await start(layer_layout=[1, 2])
    with pytest.raises(ConfigError, match="hold only 128 tokens") as too_long:
        await start(num_kv_pages=8, max_model_len=129)
    assert too_long.value.flag == "--max-model-len"
    with pytest.raises(ModelError):
        await start(model=damaged)
    assert eventually(lambda: psutil.Process().children(recursive=True) == before)


async def test_an_uneven_layout_gives_the_same_tokens(start: Start) -> None:
    even = await start()
    uneven = await start(layer_layout=[1, 3])
    outputs = [await collect(e.generate([3, 1, 4], greedy(12))) for e in (even, uneven)]
    first, second = ([t for o in output for t in o.token_ids] for output in outputs)
    assert first == second


async def test_figures_are_pushed(start: Start) -> None:
    engine = await start()
    pictures = []
    engine.on_stats = pictures.append
    await asyncio.gather(*[collect(engine.generate([t, 2], greedy(60))) for t in range(8)])
    await settled(engine, 8)
    stats = engine.stats
    assert stats.prompt_tokens == 16
    assert stats.generation_tokens == 480
    assert stats.finished == {"stop": 0, "length": 8, "abort": 0}
    assert stats.pages_free + stats.pages_cached + stats.pages_used == 128
    batches = [batch for picture in pictures for batch in picture.microbatches]
    assert sum(decode for decode, _ in batches) == 8 * 59
    assert sum(prefill for _, prefill in batches) == 16
    await asyncio.sleep(1.2)
    for seconds in engine.stats.stages:
        assert seconds.busy > 0
        assert seconds.idle > 0
        assert min(seconds.wait_input, seconds.wait_link) >= 0


@pytest.mark.parametrize("stages", [1, 2])
async def test_a_mixed_load_with_aborts_ends_with_every_page_free(
    start: Start, stages: int
) -> None:
    engine = await start(
        pipeline_parallel_size=stages,
        num_kv_pages=40,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        enable_prefix_caching=False,
    )
    source = random.Random(stages)
    ended: dict[str, int] = {"length": 0, "stop": 0, "left": 0}

    async def client(number: int) -> None:
        prompt = [source.randrange(250) for _ in range(source.randrange(1, 120))]
        params = SamplingParams(
            max_tokens=source.randrange(1, 60),
            temperature=source.choice([0.0, 1.0]),
            top_p=source.choice([1.0, 0.9]),
            repetition_penalty=source.choice([1.0, 1.2]),
            logprobs=source.choice([None, 0, 3]),
        )
        leave_after = source.randrange(1, 30) if number % 4 == 0 else None
        await asyncio.sleep(source.random() * 2)
        seen = 0
        stream = engine.generate(prompt, params)
        async for output in stream:
            seen += len(output.token_ids)
            if output.logprobs is not None:
                assert len(output.logprobs) == len(output.token_ids)
            if leave_after is not None and seen >= leave_after:
                await stream.aclose()  # type: ignore[attr-defined]
                ended["left"] += 1
                return
            if output.finish_reason is not None:
                ended[output.finish_reason] += 1

    await asyncio.gather(*[client(number) for number in range(60)])
    assert sum(ended.values()) == 60
    await settled(engine, 60)
    assert engine.stats.pages_free == 40
    # Some of those that were left had ended in the meantime.
    assert engine.stats.finished["length"] >= ended["length"]
    assert 0 < engine.stats.finished["abort"] <= ended["left"]
