"""Layers that move between stages on GPUs while requests run: nothing changes."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.config.engine import EngineConfig
from serving.engine import Engine
from serving.messages import LayersMoved, Recovering
from serving.stage.copies import Pages, Place, Tokens
from serving.stage.gpu.memory import device_tensor
from serving.transport.cuda import CudaDriver, LinkRefusedError
from tests.serving.processes import children_of
from tests.serving.stage.copying import Driver, connect
from tests.serving.test_moves import LAYERS, answers, mixed_load, random_counts
from tests.serving.tiny import make_checkpoint

pytestmark = pytest.mark.gpu

Start = Callable[..., Awaitable[Engine]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moves") / "qwen3"
    return make_checkpoint(folder, "qwen3", num_hidden_layers=LAYERS)


@pytest.fixture
async def start(checkpoint: Path) -> AsyncIterator[Start]:
    engines: list[Engine] = []

    async def make(**settings: Any) -> Engine:
        defaults: dict[str, Any] = {
            "model": checkpoint, "dtype": "float32", "num_kv_pages": 256, "max_num_seqs": 32,
            "max_num_batched_tokens": 64, "device": "cuda",
        }  # fmt: skip
        engine = await Engine.start(EngineConfig(**(defaults | settings)))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


def _where(place: str, stages: int) -> dict[str, Any]:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < (1 if place == "shared" else stages):
        pytest.skip(f"{stages} stages on GPUs of their own, and there are {found}")
    devices = ["cuda:0"] * stages if place == "shared" else None
    return {
        "pipeline_parallel_size": stages, "devices": devices, "layer_rebalance": "asked",
        "movable_layers": LAYERS,
    }  # fmt: skip


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        (2, {}),
        (2, {"cuda_graphs": False}),
        (2, {"num_kv_pages": 24, "schedule_policy": "classic"}),  # too few pages: preempted
        (3, {"movable_layers": 1}),
    ],
    ids=["recorded", "plain", "preemption", "three"],
)
async def test_moves_at_any_moment_change_no_token(
    start: Start, place: str, stages: int, settings: dict[str, Any]
) -> None:
    where = _where(place, stages)
    load = mixed_load(stages, 24)
    whole = await start(num_kv_pages=1000)
    expected = await answers(whole, load, gap=0.0)
    await whole.close()
    engine = await start(**(where | settings))
    source = random.Random(stages)
    movable = engine.config.movable
    moves: list[LayersMoved] = []
    engine.on_move = moves.append
    home, done = engine.layout, asyncio.Event()

    async def keep_moving() -> None:
        while not done.is_set():
            counts = random_counts(source, stages)
            bounds = type(home).of_counts(counts).bounds
            if all(b in window for b, window in zip(bounds, home.windows(movable), strict=True)):
                engine.move_layers(counts)
            await asyncio.sleep(source.random() * 0.05)

    moving = asyncio.create_task(keep_moving())
    found = await answers(engine, load, gap=0.02)
    done.set()
    await moving
    assert found == expected
    assert len(moves) > 5
    assert engine.stats.cached_prompt_tokens > 0
    assert await answers(engine, load[:5], gap=0.0) == expected[:5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refuses", ["", "open"], ids=["peer", "host"])
def test_copies_on_streams_of_their_own(refuses: str, dtype: torch.dtype) -> None:
    """What was launched before a copy began is in what arrives, pages and tokens of pages."""
    _where("shared", 2)
    device = torch.device("cuda:0")
    torch.zeros(1, device=device)  # makes the context that allocations need
    shape = (300, 2, 16, 2, 64)
    kv = [{7: device_tensor(shape, dtype, device)} for _ in range(2)]
    compute: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    (giver, taker), how = connect(kv, {7: [0, 1]}, [Driver(refuses), Driver()], compute)
    assert len(set(how)) == 1
    assert ("straight" in how[0]) == (not refuses)
    pages = torch.randperm(300)[:200]
    places: list[Place] = [
        Pages(pages),
        Tokens(torch.arange(300), torch.randint(0, 16, (300,))),
        Tokens(pages[:1], torch.tensor([3])),
    ]
    with ThreadPoolExecutor(1) as other:
        for number, place in enumerate(places):
            with torch.cuda.stream(compute):
                torch.cuda._sleep(20_000_000)
                kv[0][7].normal_()
            begun = giver.begin(7, place, 1)
            taken = other.submit(taker.receive, 7, place, 0)
            giver.end(7, place, 1, begun)
            taken.result(20)
            index: Any = (place.pages.to(device),)
            if isinstance(place, Tokens):
                index = (*index, slice(None), place.offsets.to(device))
            assert torch.equal(kv[1][7][index], kv[0][7][index]), number


@pytest.mark.parametrize("victim", [0, 1])
async def test_the_kill_of_a_stage_in_a_move_costs_a_pause(start: Start, victim: int) -> None:
    where, load = _where("shared", 2), mixed_load(7, 12)
    whole = await start(num_kv_pages=1000)
    expected = await answers(whole, load, gap=0.0)
    await whole.close()
    engine = await start(**where)
    stages = sorted(children_of(os.getpid(), "serving.stage"), key=lambda process: process.pid)
    told: list[Recovering | None] = []
    engine.on_recovery = told.append
    task = asyncio.create_task(answers(engine, load, gap=0.02))
    await asyncio.sleep(0.2)
    engine.move_layers([6, 2])
    stages[victim].kill()
    assert await asyncio.wait_for(task, 200) == expected
    assert [one is None for one in told] == [False, True]


def test_memory_of_another_process_is_refused_with_a_reason() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    driver = CudaDriver(torch.device("cuda:0"))
    with pytest.raises(LinkRefusedError):
        driver.open(bytes(64))
