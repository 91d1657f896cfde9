"""Layers that move between stages on GPUs, without a GPU: kernels in Triton's interpreter, streams
that run at once, copies by threads. Greedy output stays that of transformers."""

from __future__ import annotations

import ctypes
import random
from contextlib import nullcontext
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.core import Layout, StepPlan
from serving.driver.migration import Migration
from serving.messages import LayersCopied, MoveLayers, StepResult
from serving.stage.copies import Pages, Tokens
from serving.stage.moves import LayerMoves
from tests.serving.driver.fake import FakeEngine
from tests.serving.stage.copying import Driver, connect
from tests.serving.stage.test_gpu_stage import (
    CONTEXT,
    OUT,
    PAGES,
    PROMPTS,
    Pipeline,
    Stream,
    make_small,
    record_nothing,
    reference,
    without_a_gpu,
)

__all__ = ["without_a_gpu"]

LAYERS = 5


def _push(source: Tensor, address: int, starts: Tensor, length: int) -> None:
    """As the kernel, which the interpreter cannot run beside others."""
    size = length * source.itemsize
    for start in starts.tolist():
        at = start * source.itemsize
        ctypes.memmove(address + at, source.data_ptr() + at, size)


@pytest.fixture(autouse=True)
def _streams(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda which: nullcontext())
    monkeypatch.setattr(
        "serving.stage.gpu.copies.gpu_kernels", lambda: SimpleNamespace(push_rows=_push)
    )


class MovingPipeline(Pipeline):
    """Its engine decides when layers move; plans in flight are of the layout of their time."""

    def __init__(self, folder: Path, engine: FakeEngine, movable: int, refuses: str) -> None:
        stages = engine.config.pipeline_parallel_size
        home = Layout.even(LAYERS, stages)
        super().__init__(folder, engine.config, movable)
        self.engine, self.source = engine, random.Random(stages)
        self.migration = Migration(home, movable, 1)
        self.news: Queue[LayersCopied] = Queue()
        self.moved = 0
        self.announced: list[tuple[int, int, MoveLayers]] = []
        owners = {layer: home.residents(layer, movable) for layer in range(LAYERS)}
        kv = [dict(stage.kv) for stage in self.stages]
        drivers = [Driver(refuses if stage == stages - 1 else "") for stage in range(stages)]
        copies, self.how = connect(kv, owners, drivers, Stream())
        self.moves = [
            LayerMoves(
                stage, home, its,
                tell=lambda epoch, settled, stage=stage: self.news.put(  # type: ignore[misc]
                    LayersCopied(stage, 0, epoch, settled)
                ),
                failed=self.failures.append,
            )
            for stage, its in enumerate(copies)
        ]  # fmt: skip

    def decide(self) -> None:
        """Between two plans: begin a move now and then, switch when one is ready."""
        while not self.news.empty():
            self.migration.copied(self.news.get())
        scheduler, migration = self.engine.scheduler, self.migration
        bounds = tuple(self.source.choice(window) for window in migration.windows)
        layout = Layout(0, list(bounds))
        if migration.idle and layout.counts != migration.layout.counts and min(layout.counts) > 0:
            # Stages hear of it between the plans of then, which are still in flight.
            number = scheduler.next_number
            message = migration.begin(layout, scheduler.pool.held(), number, 0.0)
            self.announced += [(number, stage, message) for stage in range(len(self.stages))]
        if migration.switch(scheduler.next_number) is not None:
            self.moved += 1
            scheduler.epoch = migration.layout.epoch

    def step(self, stage: int, plan: StepPlan) -> None:
        moves = self.moves[stage]
        for entry in [one for one in self.announced if one[0] <= plan.number and one[1] == stage]:
            self.announced.remove(entry)
            moves.begin(entry[2])
        rows = self.mirrors[stage].apply(plan)
        moves.before(plan.epoch, rows)
        self.stages[stage].compute(moves.layout.layers(stage))
        self.stages[stage].step(rows, plan)
        moves.after(rows)

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        assert not self.failures
        return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("tiny") / "model", LAYERS)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return reference(checkpoint)


@pytest.mark.parametrize(
    ("stages", "movable", "recorded", "refuses"),
    [
        (2, LAYERS, True, ""),
        (2, 1, True, "open"),
        (3, LAYERS, False, ""),
        pytest.param(2, LAYERS, False, "export", marks=pytest.mark.full),
        pytest.param(3, LAYERS, True, "export", marks=pytest.mark.full),
        pytest.param(3, 1, True, "", marks=pytest.mark.full),
    ],
)
def test_moves_change_no_token(
    stages: int,
    movable: int,
    recorded: bool,
    refuses: str,
    checkpoint: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.stage.gpu.graphs.StepGraphs.record", record_nothing)
    engine = FakeEngine(
        PAGES, CONTEXT, pipeline_parallel_size=stages, max_num_batched_tokens=8, max_num_seqs=4,
        cuda_graphs=recorded, page_size=4, enable_prefix_caching=False,
    )  # fmt: skip
    pipeline: Any = MovingPipeline(checkpoint, engine, movable, refuses)
    engine.model = pipeline
    words = "through the host" if refuses else "straight into the other"
    assert all(words in how for how in pipeline.how)
    for _ in range(3):
        streams = [
            engine.submit(prompt, max_tokens=OUT, temperature=0.0, ignore_eos=True)
            for prompt in PROMPTS
        ]
        while engine.scheduler.streams or engine.plans:
            pipeline.decide()
            while engine.plan() is not None:
                pass
            engine.run_one()
        for stream, right in zip(streams, expected, strict=True):
            assert engine.outputs[stream][: len(right)] == right
    assert pipeline.moved > 2
    assert all((stage._replayed > 0) == recorded for stage in pipeline.stages)
    pipeline.close()


def test_pieces_make_up_every_layout() -> None:
    """Whatever a stage owns is whole pieces, and what it always owns is one of them."""
    for layers, stages, movable in ((5, 2, 5), (5, 3, 1), (36, 4, 2), (9, 3, 0), (4, 4, 4)):
        home = Layout.even(layers, stages)
        for stage in range(stages):
            pieces = home.pieces(stage, movable)
            assert [n for piece in pieces for n in piece] == list(home.resident(stage, movable))
            first, last = (home.windows(movable)[n] for n in (stage, stage + 1))
            for start in first:
                for end in last:
                    own = [p for p in pieces if p.start in range(start, end)]
                    if start < end:
                        assert [n for p in own for n in p] == list(range(start, end))
            if movable == 0:
                assert pieces == [home.layers(stage)]


def test_places_of_rows() -> None:
    from serving.stage.gpu.copies import _rows

    kv = torch.zeros(6, 2, 4, 3, 8)
    starts, length = _rows(Pages(torch.tensor([5, 0])), kv)
    assert (starts.tolist(), length) == ([5 * kv[0].numel(), 0], kv[0].numel())
    starts, length = _rows(Tokens(torch.tensor([1, 4]), torch.tensor([3, 0])), kv)
    flat = torch.arange(kv.numel()).view(kv.shape)
    assert starts.tolist() == [flat[page, half, at, 0, 0].item()
                               for page, at in ((1, 3), (4, 0)) for half in (0, 1)]  # fmt: skip
    assert length == 24
