"""Peer links between simulated GPUs: whatever runs first, what arrives is what was sent."""

from __future__ import annotations

import random
import threading
from collections import deque

import pytest
import torch
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.connect import agree
from serving.transport.cuda import LinkRefusedError
from serving.transport.peer import PeerTransport
from tests.serving.transport.simulated_gpu import Notes, SimulatedGpu, World

WIDTH, MOST, ROWS = 3, 8, 5


class Stage:
    """One stage's launches: it takes what comes, adds one, and sends it on."""

    def __init__(self, world: World, notes: Notes, stage: int, stages: int) -> None:
        self.gpu = SimulatedGpu(world)
        self.stage, self.stages = stage, stages
        self.compute = self.gpu.stream()
        self.links = PeerTransport(
            stage, stages, self.gpu, self.compute, notes,
            max_tokens=MOST, hidden_size=WIDTH, dtype=torch.float32, max_rows=ROWS,
        )  # fmt: skip
        self.seen: list[Tensor] = []
        self.tokens: dict[int, list[int]] = {}
        self._hidden = torch.zeros(MOST, WIDTH)
        self._expected: deque[tuple[int, int]] = deque()

    def launch(self, number: int, rows: int, drawn: int, reads_from: int) -> None:
        """Micro-batch `number` of `rows` rows, `drawn` of which get a token."""
        links, run = self.links, self._run
        if self.stage == 0:
            while self._expected and (
                self._expected[0][0] <= max(reads_from, number - self.stages - 1)
            ):
                before, count = self._expected.popleft()
                entry = links.incoming_tokens(before)
                run(lambda e=entry, n=before, c=count: self.tokens.update({n: e[1, :c].tolist()}))
            run(lambda: self._hidden[:rows].fill_(float(number)))
            if drawn:
                self._expected.append((number, drawn))
                links.expect_tokens(number)
        else:
            found = links.incoming(number, rows)
            run(lambda: self._hidden[:rows].copy_(found))
            links.taken(number)
            run(lambda: self.seen.append(self._hidden[:rows].clone()))
            run(lambda: self._hidden[:rows].add_(1.0))
        if self.stage < self.stages - 1:
            place = links.outgoing(number, rows)
            run(lambda: place.copy_(self._hidden[:rows]))
            links.send(number, rows)
        elif drawn:
            entry = links.outgoing_tokens(number)
            run(lambda: entry[1, :drawn].copy_(torch.arange(drawn) + 100 * number))
            links.send_tokens(number)

    def _run(self, work: object) -> None:
        assert callable(work)
        self.gpu.launch(self.compute, work)


def make(stages: int, seed: int, *, shared_queues: bool = False) -> tuple[World, list[Stage]]:
    world, notes = World(seed, shared_queues=shared_queues), Notes()
    group = [Stage(world, notes, stage, stages) for stage in range(stages)]
    for stage in group:
        stage.links.connect()
    return world, group


def run_together(group: list[Stage], name: str) -> list[BaseException]:
    """Call a method of every stage's links, each on a thread of its own."""
    errors: list[BaseException] = []

    def call(stage: Stage) -> None:
        try:
            getattr(stage.links, name)()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(stage,), daemon=True) for stage in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a stage hangs"
    return errors


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_everything_arrives_whole_and_in_order(stages: int, seed: int) -> None:
    """Plans come when they may (stages + 1 in flight), each stage launches when it likes, and
    streams run in any order."""
    world, group = make(stages, seed, shared_queues=seed % 2 == 1)
    source = random.Random(seed)
    plans = []
    reads = -1
    for number in range(40):
        drawn = source.choice((0, 0, 1, ROWS)) if seed % 3 else 1
        plans.append(
            (number, source.randint(1, MOST), drawn, reads if source.random() < 0.5 else -1)
        )
        if drawn:
            reads = number
    assert not run_together(group, "warm_up")
    done, sent = 0, 0
    waiting: list[deque[tuple[int, int, int, int]]] = [deque() for _ in group]
    while done < len(plans):
        if sent < len(plans) and sent - done < stages + 1:
            for queue in waiting:
                queue.append(plans[sent])
            sent += 1
        for stage in source.sample(range(stages), stages):
            if waiting[stage] and source.random() < 0.6:
                group[stage].launch(*waiting[stage].popleft())
        for _ in range(source.randint(0, 30)):
            world.step()
        if sent - done == stages + 1 or sent == len(plans):
            for stage, queue in enumerate(waiting):
                while queue:
                    group[stage].launch(*queue.popleft())
            world.run()
        done = len(group[-1].seen)
    world.run()
    for stage in group[1:]:
        assert [len(rows) for rows in stage.seen] == [plan[1] for plan in plans]
        for (number, *_), rows in zip(plans, stage.seen, strict=True):
            assert (rows == float(number + stage.stage - 1)).all()
    for number, _, drawn, _ in plans[: -stages - 1]:
        if drawn:
            assert group[0].tokens[number] == [100 * number + i for i in range(drawn)]
    assert not run_together(group, "close")
    assert not any(world.queues)


def test_a_stage_runs_ahead_of_the_next_only_as_far_as_there_are_buffers() -> None:
    """Without the driver's bound on what is in flight, the credit still protects the rows."""
    stages = 2
    world, group = make(stages, 1)
    first, second = group
    assert not run_together(group, "warm_up")
    for number in range(8):
        first.launch(number, 2, 0, -1)
    while world.step():
        pass
    assert any(world.queues), "the sender did not wait for a credit"
    assert second.seen == []
    for number in range(8):
        second.launch(number, 2, 0, -1)
    world.run()
    assert [float(rows[0, 0]) for rows in second.seen] == [float(n) for n in range(8)]


def test_numbers_may_pass_the_end_of_a_word() -> None:
    world, group = make(2, 3)
    world.run()
    start = (1 << 32) - 6
    for gpu in group:
        # As if everything up to there had passed.
        for flag in (0, 256, 512):
            world.memory[gpu.links._block + flag : gpu.links._block + flag + 4] = gpu.links._word(
                start - 1
            ).to_bytes(4, "little")
    for number in range(start, start + 12):
        for stage in group:
            stage.launch(number, 3, 1, number - 1 if number > start else -1)
        world.run()
    assert len(group[1].seen) == 12
    assert list(group[0].tokens) == list(range(start, start + 11))


class _Forgetful(SimulatedGpu):
    """Loses what it copies to a neighbour, or the words that say so."""

    def __init__(self, world: World, loses: str) -> None:
        super().__init__(world)
        self._loses = loses

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        if self._loses != "rows":
            super().copy(stream, target, source, size)

    def write(self, stream: int, address: int, value: int) -> None:
        if self._loses != "words":
            super().write(stream, address, value)


@pytest.mark.parametrize(("loses", "says"), [("rows", "wrong values"), ("words", "nothing within")])
def test_the_check_at_the_start_names_the_link(
    loses: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.transport.peer._CHECK_SECONDS", 0.2)
    world, group = make(2, 0)
    broken = _Forgetful(world, loses)
    group[0].links._driver = broken
    errors = run_together(group, "warm_up")
    assert errors
    assert all(isinstance(error, EngineDeadError) for error in errors)
    assert any("from stage 0 to stage 1" in str(error) and says in str(error) for error in errors)
    assert all("--transport nccl" in str(error) for error in errors)


def test_closing_does_not_wait_for_a_neighbour_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.transport.peer._CLOSE_SECONDS", 0.1)
    world, group = make(2, 0)
    first = group[0]
    assert not run_together(group, "warm_up")
    for number in range(6):
        first.launch(number, 2, 1, number - 1)
    while world.step():
        pass
    assert not run_together([first], "close")
    assert any(world.queues)


class _NoSharing(SimulatedGpu):
    def open(self, handle: bytes) -> int:
        raise LinkRefusedError("cuIpcOpenMemHandle_v2 answered CUDA_ERROR_NOT_SUPPORTED")


def test_all_stages_learn_of_a_refusal() -> None:
    """One stage cannot map its neighbour's memory, another has none to show."""
    world, notes = World(0), Notes()
    found: dict[int, str] = {}

    def start(stage: int) -> None:
        refusal = ""
        gpu = _NoSharing(world) if stage == 2 else SimulatedGpu(world)
        try:
            if stage == 3:
                PeerTransport.give_up(3, notes)
                raise LinkRefusedError("no memory")
            PeerTransport(
                stage, 4, gpu, gpu.stream(), notes,
                max_tokens=MOST, hidden_size=WIDTH, dtype=torch.float32, max_rows=ROWS,
            ).connect()  # fmt: skip
        except LinkRefusedError as error:
            refusal = str(error)
        found[stage] = agree(stage, 4, refusal, notes)

    threads = [threading.Thread(target=start, args=(stage,), daemon=True) for stage in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(found.values()) == {
        "on stage 2: cuIpcOpenMemHandle_v2 answered CUDA_ERROR_NOT_SUPPORTED"
    }
    assert len(found) == 4
