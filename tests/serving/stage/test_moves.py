"""KV that moves between stages: every token of it is read as its last writer left it.

Stages are threads at their own, uneven pace. A layer "computes" by writing the micro-batch's number
to the places of its tokens, and first looks whether all that its rows may read is what the plans
say was written last.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from queue import Queue

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from serving.core import Layout, StepPlan
from serving.driver.migration import Migration
from serving.errors import EngineDeadError
from serving.messages import LayersCopied, MoveLayers
from serving.stage.copies import LinkedCopies
from serving.stage.mirror import Mirror, Rows
from serving.stage.moves import LayerMoves
from serving.transport.layers import LayerLinks
from tests.serving.driver.fake import FakeEngine

LAYERS, PAGES, PAGE, SLOTS, CONTEXT = 7, 40, 4, 8, 64


class Wires:
    """What is on its way between stages, by sender and receiver."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.queues: defaultdict[tuple[int, int], Queue[Tensor | None]] = defaultdict(Queue)

    def pause(self) -> None:
        if self._random.random() < 0.3:
            time.sleep(self._random.random() * 0.002)

    def links(self, stage: int) -> LayerLinks:
        wires = self

        class Links(LayerLinks):
            def send(self, rows: Tensor, peer: int) -> None:
                wires.pause()
                wires.queues[stage, peer].put(rows.clone())

            def receive(self, rows: Tensor, peer: int) -> None:
                came = wires.queues[peer, stage].get()
                if came is None:
                    raise EngineDeadError("cut")
                wires.pause()
                assert came.shape == rows.shape
                rows.copy_(came)

        return Links()


@dataclass
class Load:
    """Plans of a load in order, and before each the pages that held anything."""

    plans: list[StepPlan] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)

    @classmethod
    def random(cls, seed: int, stages: int) -> Load:
        source = random.Random(seed)
        engine = FakeEngine(
            PAGES,
            CONTEXT,
            page_size=PAGE,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=24,
            pipeline_parallel_size=stages,
            schedule_policy=source.choice(["throttle", "classic"]),
        )
        load = cls()
        start = [source.randrange(50) for _ in range(30)]
        waiting = 60
        while waiting or engine.scheduler.streams:
            if waiting and source.random() < 0.4:
                waiting -= 1
                prompt = [*start[: source.randrange(30)], source.randrange(50)]
                engine.submit(prompt, max_tokens=source.randrange(1, 30), ignore_eos=True)
            held = engine.scheduler.pool.held()
            plan = engine.plan()
            if plan is not None:
                load.plans.append(plan)
                load.held.append(held)
            elif engine.plans:
                engine.run_one()
        return load


class StageThread(threading.Thread):
    """Runs messages in order; `before` and `after` link it with its neighbours."""

    def __init__(
        self, stage: int, layout: Layout, moves: LayerMoves, kv: dict[int, Tensor], wires: Wires
    ) -> None:
        super().__init__(daemon=True)
        self.stage, self.layout, self.moves, self.kv, self.wires = stage, layout, moves, kv, wires
        self.messages: Queue[StepPlan | MoveLayers | None] = Queue()
        self.before: Queue[int] | None = None
        self.after: Queue[int] = Queue()
        self.mirror = Mirror(SLOTS, CONTEXT, PAGE, holds_tokens=False)
        self.writer = np.full(PAGES * PAGE, -1)
        self.read = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while (message := self.messages.get()) is not None:
                if isinstance(message, MoveLayers):
                    self.moves.begin(message)
                else:
                    self.compute(message)
        except BaseException as error:
            self.error = error
            self.after.put(-1)

    def compute(self, plan: StepPlan) -> None:
        rows = self.mirror.apply(plan)
        self.moves.before(plan.epoch, rows)
        self.layout = self.moves.layout
        if self.before is not None:
            assert self.before.get() == plan.number
        self.wires.pause()
        places = _places(rows)
        for layer in self.layout.layers(self.stage):
            flat = self.kv[layer][:, 0, :, 0, 0].reshape(-1)
            expected = torch.from_numpy(self.writer[places])
            found = flat[torch.from_numpy(places)]
            known = expected >= 0
            assert torch.equal(found[known], (expected + 1000 * layer)[known].to(found.dtype))
            self.read += int(known.sum())
            pages, offsets = np.divmod(rows.slot_mapping, PAGE)
            self.kv[layer][torch.from_numpy(pages), :, torch.from_numpy(offsets)] = float(
                plan.number + 1000 * layer
            )
        self.writer[rows.slot_mapping] = plan.number
        self.moves.after(rows)
        self.after.put(plan.number)


def _places(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where the keys lie that the rows read and that were written before."""
    places = []
    for row, context in enumerate(rows.context_lens.tolist()):
        starts = rows.query_starts
        old = np.arange(context - (starts[row + 1] - starts[row]))
        table = rows.page_tables[row].astype(np.int64)
        places.append(table[old // PAGE] * PAGE + old % PAGE)
    return np.concatenate(places)


class Pipeline:
    def __init__(self, stages: int, seed: int) -> None:
        self.wires = Wires(seed)
        self.news: Queue[LayersCopied | str] = Queue()
        home = Layout.even(LAYERS, stages)
        self.migration = Migration(home, LAYERS, 1)
        self.stages = []
        for stage in range(stages):
            kv = {layer: torch.full((PAGES, 2, PAGE, 1, 1), -1.0) for layer in range(LAYERS)}
            moves = LayerMoves(
                stage,
                home,
                LinkedCopies(kv, self.wires.links(stage)),
                tell=lambda epoch, settled, stage=stage: self.news.put(  # type: ignore[misc]
                    LayersCopied(stage, 0, epoch, settled)
                ),
                failed=self.news.put,
            )
            self.stages.append(StageThread(stage, home, moves, kv, self.wires))
        for one, other in pairwise(self.stages):
            other.before = one.after
        for one in self.stages:
            one.start()

    def send(self, message: StepPlan | MoveLayers | None) -> None:
        for stage in self.stages:
            stage.messages.put(message)

    def take_news(self) -> None:
        while not self.news.empty():
            message = self.news.get()
            assert isinstance(message, LayersCopied), message
            self.migration.copied(message)

    def run(self, load: Load, source: random.Random) -> int:
        """Serve a load with moves now and then; the number of moves."""
        moves = done = 0
        depth = len(self.stages) + 1
        for index, (plan, held) in enumerate(zip(load.plans, load.held, strict=True)):
            while index - done >= depth:
                assert self.stages[-1].after.get(timeout=20) == done, self.errors()
                done += 1
            self.take_news()
            if self.migration.idle and source.random() < 0.3:
                layout = _random_layout(source, len(self.stages))
                if layout.bounds != self.migration.layout.bounds:
                    self.send(self.migration.begin(layout, held, index, 0.0))
            if self.migration.switch(index) is not None:
                moves += 1
            self.send(msgspec.structs.replace(plan, epoch=self.migration.layout.epoch))
        for number in range(done, len(load.plans)):
            assert self.stages[-1].after.get(timeout=20) == number, self.errors()
        self.send(None)
        return moves

    def errors(self) -> list[BaseException | None]:
        return [stage.error for stage in self.stages]


def _random_layout(source: random.Random, stages: int) -> Layout:
    cuts = [0, *sorted(source.sample(range(1, LAYERS), stages - 1)), LAYERS]
    return Layout.of_counts([end - start for start, end in pairwise(cuts)])


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_moves_every_layer_reads_what_was_written_last(stages: int, seed: int) -> None:
    pipeline = Pipeline(stages, seed)
    moves = pipeline.run(Load.random(10 * stages + seed, stages), random.Random(seed))
    assert moves > 5
    assert all(stage.read > 1000 for stage in pipeline.stages)


def test_a_link_that_is_cut_in_the_middle_is_told_and_ends_the_wait() -> None:
    """The stage that needs what will not come stops with a sentence instead of hanging."""
    pipeline = Pipeline(2, 0)
    load = Load.random(5, 2)
    layout = Layout.of_counts([LAYERS - 1, 1])
    for plan in load.plans[:20]:
        pipeline.send(plan)
        assert pipeline.stages[-1].after.get(timeout=20) == plan.number
    pipeline.send(pipeline.migration.begin(layout, load.held[20], 20, 0.0))
    copied = pipeline.news.get(timeout=20)
    assert copied == LayersCopied(0, 0, 1, settled=False)
    pipeline.wires.queues[1, 0].put(None)
    for plan in load.plans[20:24]:
        pipeline.send(plan)
    assert pipeline.news.get(timeout=20) == "cut"
    for plan in load.plans[24:]:
        pipeline.send(msgspec.structs.replace(plan, epoch=1))
    pipeline.stages[0].join(20)
    assert isinstance(pipeline.stages[0].error, EngineDeadError)


@pytest.mark.parametrize("spoilt", [None, 0, 3])
def test_links_are_tried_out_and_wrong_values_are_seen(spoilt: int | None) -> None:
    """Three stages; message number `spoilt` of the first one is wrong."""
    wires = Wires(0)
    owners = {1: [0, 1], 4: [0, 1, 2]}
    kv = [{n: torch.zeros(PAGES, 2, PAGE, 1, 1) for n in owners} for _ in range(3)]

    def try_out(stage: int) -> None:
        links = wires.links(stage)
        sent = itertools.count()
        send = links.send

        def spoil(rows: Tensor, peer: int) -> None:
            wrong = stage == 0 and next(sent) == spoilt
            send(rows + 1 if wrong else rows, peer)

        links.send = spoil  # type: ignore[method-assign]
        LinkedCopies(kv[stage], links).try_out(stage, owners)

    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(try_out, stage) for stage in range(3)]
        wait(made, timeout=20, return_when=FIRST_EXCEPTION)
        for pair in itertools.permutations(range(3), 2):
            wires.queues[pair].put(None)  # for those who wait for one that stopped
    errors = [str(error) for future in made if (error := future.exception()) is not None]
    assert sum("stage 0 gave to stage" in error for error in errors) == (spoilt is not None)
    if spoilt is None:
        assert not errors
        assert not any(tensor.any() for stage in kv for tensor in stage.values())


def test_a_plan_of_a_layout_that_nobody_announced_is_refused() -> None:
    pipeline = Pipeline(2, 0)
    plan = Load.random(5, 2).plans[0]
    pipeline.send(msgspec.structs.replace(plan, epoch=1))
    pipeline.stages[0].join(20)
    assert "nobody announced" in str(pipeline.stages[0].error)
