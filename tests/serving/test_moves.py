"""Layers that move between stages of real processes while requests run: nothing changes."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from serving.config.engine import EngineConfig
from serving.core import SamplingParams
from serving.engine import Engine
from serving.errors import ConfigError
from serving.messages import LayersMoved, Recovering
from tests.serving.processes import children_of
from tests.serving.tiny import load_reference, make_checkpoint, make_soft_checkpoint

Start = Callable[..., Awaitable[Engine]]
LAYERS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moves") / "qwen3"
    return make_checkpoint(folder, "qwen3", num_hidden_layers=LAYERS)


@pytest.fixture
async def start(checkpoint: Path) -> AsyncIterator[Start]:
    engines: list[Engine] = []

    async def make(**settings: object) -> Engine:
        defaults: dict[str, object] = {
            "model": checkpoint,
            "pipeline_parallel_size": 2,
            "dtype": "float32",
            "num_kv_pages": 256,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 64,
            "threads": 1,
            "layer_rebalance": "asked",
            "movable_layers": LAYERS,
        }
        engine = await Engine.start(EngineConfig(**(defaults | settings)))  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


Prompts = list[tuple[list[int], SamplingParams]]


def mixed_load(seed: int, count: int) -> Prompts:
    """Prompts that share beginnings, greedy and drawn answers of different lengths."""
    source = random.Random(seed)
    starts = [[source.randrange(250) for _ in range(80)] for _ in range(3)]
    load = []
    for _ in range(count):
        start = source.choice(starts)[: source.randrange(80)]
        prompt = start + [source.randrange(250) for _ in range(source.randrange(1, 60))]
        params = SamplingParams(
            max_tokens=source.randrange(1, 80),
            temperature=source.choice([0.0, 0.0, 1.0]),
            seed=source.randrange(1000),
            ignore_eos=True,
        )
        load.append((prompt, params))
    return load


async def answers(engine: Engine, load: Prompts, *, gap: float) -> list[list[int]]:
    async def one(number: int, prompt: list[int], params: SamplingParams) -> list[int]:
        await asyncio.sleep(number * gap)
        found: list[int] = []
        async for output in engine.generate(prompt, params):
            found += output.token_ids
        return found

    return list(await asyncio.gather(*(one(i, *asked) for i, asked in enumerate(load))))


def random_counts(source: random.Random, stages: int) -> list[int]:
    cuts = sorted(source.sample(range(1, LAYERS), stages - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, LAYERS], strict=True)]


Whole = dict[int, tuple[Prompts, list[list[int]]]]


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Whole:
    """Loads, and what a model in one piece answers."""

    async def ask() -> Whole:
        config = EngineConfig(model=checkpoint, dtype="float32", num_kv_pages=1000, threads=1)
        engine = await Engine.start(config)
        loads = {number: mixed_load(number, 24 if number else 8) for number in (0, 2, 3, 4)}
        found = {n: (load, await answers(engine, load, gap=0.0)) for n, load in loads.items()}
        await engine.close()
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        (2, {}),
        (3, {"num_kv_pages": 24, "schedule_policy": "classic"}),  # too few pages: preempted
        (4, {"cache_eviction": "fifo"}),
    ],
    ids=["two", "three with preemption", "four"],
)
async def test_moves_at_any_moment_change_no_token(
    start: Start, whole: Whole, stages: int, settings: dict[str, object]
) -> None:
    load, expected = whole[stages]
    engine = await start(pipeline_parallel_size=stages, **settings)
    source = random.Random(stages)
    moves: list[LayersMoved] = []
    engine.on_move = moves.append
    done = asyncio.Event()

    async def keep_moving() -> None:
        while not done.is_set():
            engine.move_layers(random_counts(source, stages))
            await asyncio.sleep(source.random() * 0.1)

    moving = asyncio.create_task(keep_moving())
    found = await answers(engine, load, gap=0.05)
    done.set()
    await moving
    assert found == expected
    assert len(moves) > 10
    for before, after in pairwise(moves):
        assert after.before == before.counts
    if stages == 3:
        assert engine.stats.preemptions > 0
    # Prefixes that were computed before moves are found after them.
    assert engine.stats.cached_prompt_tokens > 0
    assert await answers(engine, load[:5], gap=0.0) == expected[:5]


#: Between the two best logits of the reference, where answers in bfloat16 may part.
NEAR = 0.05


async def test_moves_in_bfloat16_part_only_where_two_tokens_are_nearly_alike(
    start: Start, tmp_path: Path
) -> None:
    folder = make_soft_checkpoint(tmp_path / "soft", "qwen3", num_hidden_layers=LAYERS)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    load = [(prompt, params) for prompt, _ in mixed_load(9, 16)]
    settings: dict[str, object] = {"model": folder, "dtype": "bfloat16"}
    still = await start(**settings, layer_rebalance="off")
    expected = await answers(still, load, gap=0.05)
    await still.close()
    engine = await start(**settings)
    source = random.Random(9)
    moves: list[LayersMoved] = []
    engine.on_move = moves.append
    running = asyncio.create_task(answers(engine, load, gap=0.05))
    while not running.done():
        engine.move_layers(random_counts(source, 2))
        await asyncio.sleep(source.random() * 0.1)
    assert len(moves) > 5
    model = load_reference(folder, torch.bfloat16)
    for (prompt, _), found, right in zip(load, await running, expected, strict=True):
        assert len(found) == len(right)
        at = next((n for n, (a, b) in enumerate(zip(found, right, strict=True)) if a != b), None)
        if at is not None:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + right[:at]])).logits[0, -1].float()
            best = logits.topk(2)
            assert {found[at], right[at]} == set(best.indices.tolist())
            assert float(best.values[0] - best.values[1]) <= NEAR


async def test_what_stages_do_not_hold_is_refused(start: Start) -> None:
    engine = await start(movable_layers=1)
    for counts in ([2, 6], [8, 0], [4, 3], [4, 2, 2]):
        with pytest.raises(ConfigError, match="may move by at most 1"):
            engine.move_layers(counts)
    engine.move_layers([5, 3])
    fixed = await start(layer_rebalance="off")
    with pytest.raises(ConfigError, match="--layer-rebalance off"):
        fixed.move_layers([5, 3])


@pytest.mark.parametrize(
    ("when", "victim"),
    [
        ("copying", 1),
        ("switched", 0),
        *(
            pytest.param(when, victim, marks=pytest.mark.full)
            for when, victim in [("copying", 0), ("copying", 2), ("switched", 1), ("switched", 2)]
        ),
    ],
)
async def test_the_kill_of_any_stage_in_a_move_costs_a_pause(
    start: Start, whole: Whole, when: str, victim: int
) -> None:
    """A layer goes from stage 1 to stage 0. While it is copied, stage 0 stands still."""
    load, expected = whole[0]
    engine = await start(pipeline_parallel_size=3)
    stages = children_of(os.getpid(), "serving.stage")
    stages.sort(key=lambda process: process.pid)
    told: list[Recovering | None] = []
    engine.on_recovery = told.append
    before = engine.layout.counts
    after = [before[0] + 1, before[1] - 1, before[2]]
    if when == "switched":
        engine.on_move = lambda move: stages[victim].kill()
    running = asyncio.create_task(answers(engine, load, gap=0.0))
    await asyncio.sleep(0.2)
    if when == "copying":
        stages[0].suspend()
    engine.move_layers(after)
    if when == "copying":
        await asyncio.sleep(0.2)
        stages[victim].kill()
    assert await asyncio.wait_for(running, 120) == expected
    assert [one is None for one in told] == [False, True]
    assert engine.stats.restarts == 1
    assert engine.stats.layers == (before if when == "copying" else after)
