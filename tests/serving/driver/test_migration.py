"""Moves of layers as the driver sees them: the protocol, and in the loop with stages of threads."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core import Layout, SamplingParams, StepPlan
from serving.driver import loop, timings
from serving.driver.balance import Balancer
from serving.driver.migration import Migration
from serving.messages import (
    EngineStats,
    FromStage,
    LayersCopied,
    LayersMoved,
    MoveLayers,
    Rebalance,
    StageSpec,
    StepOutputs,
    StepTime,
    Stop,
    Submit,
    ToStage,
)
from tests.serving.driver.fake import expected_output
from tests.serving.driver.threads import Client, StageThread

HOME = Layout.of_counts([3, 3, 3])
TARGET = Layout.of_counts([4, 3, 2])  # a layer to stage 0, another one to stage 1


def copied(stage: int, epoch: int = 1, *, rank: int = 0, settled: bool = False) -> LayersCopied:
    return LayersCopied(stage, rank, epoch, settled)


def test_a_move_switches_when_all_who_get_layers_have_the_pages() -> None:
    migration = Migration(HOME, 2, ranks=2)
    assert migration.idle
    message = migration.begin(TARGET, [1, 5, 9], 7, 10.0)
    assert message.layout == Layout(1, TARGET.bounds)
    assert np.frombuffer(message.pages, "<u4").tolist() == [1, 5, 9]
    for stage, rank in ((0, 0), (0, 1), (1, 1)):
        migration.copied(copied(stage, rank=rank))
        assert migration.switch(9) is None
        assert migration.layout == HOME
    migration.copied(copied(1, rank=0))
    assert migration.switch(9) == migration.layout == Layout(1, TARGET.bounds)
    assert migration.switch(9) is None
    for stage, rank in ((0, 0), (0, 1), (1, 0)):
        migration.copied(copied(stage, rank=rank, settled=True))
        assert not migration.idle
    migration.copied(copied(1, rank=1, settled=True))
    assert migration.idle


def test_what_ends_in_the_middle_leaves_the_layout_that_plans_followed() -> None:
    migration = Migration(HOME, 2, ranks=1)
    migration.begin(TARGET, [], 7, 0.0)
    migration.copied(copied(0))
    migration.forget()
    assert migration.layout == HOME
    assert migration.idle
    assert migration.switch(9) is None
    migration.begin(TARGET, [], 7, 0.0)
    migration.copied(copied(0))
    migration.copied(copied(1))
    assert migration.switch(9) is not None
    migration.forget()  # what was written last was still on its way
    assert migration.idle
    assert migration.layout.bounds == TARGET.bounds


def test_where_nothing_was_planned_in_a_move_nothing_is_left_to_settle() -> None:
    migration = Migration(HOME, 2, ranks=1)
    migration.begin(TARGET, [], 7, 0.0)
    migration.copied(copied(0))
    migration.copied(copied(1))
    assert migration.switch(7) is not None
    assert migration.idle
    migration.begin(HOME, [], 7, 0.0)  # stages 1 and 2 get theirs back
    migration.copied(copied(1, settled=True))  # of the move before
    for stage in (1, 2):
        migration.copied(copied(stage, 2))
    assert migration.switch(8) is not None
    assert not migration.idle
    for stage in (1, 2):
        migration.copied(copied(stage, 2, settled=True))
    assert migration.idle


def test_layers_go_nowhere_they_are_not_held() -> None:
    migration = Migration(HOME, 1, ranks=1)
    assert migration.allows(Layout.of_counts([4, 1, 4]))
    for counts in ([5, 2, 2], [1, 4, 4], [3, 6], [3, 3, 4]):
        assert not migration.allows(Layout.of_counts(counts))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 20), st.data())
def test_windows_hold_what_is_resident_and_every_stage_keeps_a_layer(
    stages: int, more: int, movable: int, data: st.DataObject
) -> None:
    layers = stages + more
    home = Layout.even(layers, stages)
    windows = home.windows(movable)
    assert all(bound in window for bound, window in zip(home.bounds, windows, strict=True))
    bounds = [data.draw(st.sampled_from(list(window))) for window in windows]
    if sorted(set(bounds)) != bounds:
        return
    layout = Layout(0, bounds)
    for stage in range(stages):
        resident = home.resident(stage, movable)
        assert set(layout.layers(stage)) <= set(resident)
        assert all(layout.owner(layer) == stage for layer in layout.layers(stage))


# ---- in the loop


class Seen:
    """What each stage was sent."""

    def __init__(self) -> None:
        self.messages: list[list[ToStage]] = [[], []]

    def behave(self, spec: StageSpec, message: ToStage | None) -> str | FromStage | None:
        if message is not None:
            self.messages[spec.stage].append(message)
        return None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    monkeypatch.setattr(StageThread, "behave", found.behave, raising=False)
    return found


def moved(client: Client) -> LayersMoved:
    message = client.until(lambda one: isinstance(one, LayersMoved))
    assert isinstance(message, LayersMoved)
    return message


def test_the_first_plan_of_a_new_epoch_is_the_same_on_all_stages(
    directory: Path, seen: Seen
) -> None:
    with Client(directory, pipeline_parallel_size=2, layer_rebalance="asked") as client:
        client.ready()
        client.send(Submit(client.request(1, [3, 1, 4, 1, 5], 60)))
        client.send(Rebalance([3, 1]))
        told = moved(client)
        assert (told.before, told.counts, told.slowest) == ([2, 2], [3, 1], None)
        client.send(Rebalance([3, 1]))  # nothing to do
        client.send(Rebalance([1, 3]))
        told = moved(client)
        assert (told.before, told.counts) == ([3, 1], [1, 3])
        client.until(lambda one: isinstance(one, EngineStats) and one.finished["length"] == 1)
        client.send(Submit(client.request(2, [1, 2, 3], 3)))
        stats = client.until(
            lambda one: isinstance(one, EngineStats) and one.finished["length"] == 2
        )
        assert isinstance(stats, EngineStats)
        assert stats.layers == [1, 3]
        client.send(Stop())
        assert client.failure() is None
    first, second = (
        [(one.number, one.epoch) if isinstance(one, StepPlan) else one for one in messages]
        for messages in seen.messages
    )
    assert first == second
    epochs = [one.epoch for one in seen.messages[0] if isinstance(one, StepPlan)]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}
    moves = [one for one in seen.messages[0] if isinstance(one, MoveLayers)]
    assert [move.layout.bounds for move in moves] == [[0, 3, 4], [0, 1, 4]]


@pytest.mark.parametrize("when", ["copying", "settling", "after"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_in_a_move_leaves_a_whole_layout_and_every_token(
    directory: Path, monkeypatch: pytest.MonkeyPatch, when: str, victim: int
) -> None:
    """Stage 0 gets a layer. It dies, or the one that gives it, before the switch or behind it."""
    killed = threading.Event()

    def behave(spec: StageSpec, message: ToStage | None) -> str | None:
        if killed.is_set() or spec.stage != victim:
            return None
        copying = isinstance(message, MoveLayers)
        switched = isinstance(message, StepPlan) and message.epoch == 1
        later = isinstance(message, StepPlan) and switched and message.number > 20
        if {"copying": copying, "settling": switched, "after": later}[when]:
            killed.set()
            return "die"
        return None

    monkeypatch.setattr(StageThread, "behave", behave, raising=False)
    prompts = {stream: [stream, 3, 1, 4, 1, 5] for stream in range(1, 7)}
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Client(directory, pipeline_parallel_size=2, layer_rebalance="asked") as client:
        client.ready()
        for stream, prompt in prompts.items():
            client.send(Submit(client.request(stream, prompt, 60)))
        client.until(lambda one: isinstance(one, StepOutputs) and bool(one.streams))
        client.send(Rebalance([3, 1]))
        stats = client.until(
            lambda one: isinstance(one, EngineStats) and one.finished["length"] == 6
        )
        assert isinstance(stats, EngineStats)
        assert stats.restarts == 1
        if when != "copying":
            assert stats.layers == [3, 1]
        elif victim == 0:  # it cannot have said that it got the pages
            assert stats.layers == [2, 2]
        # And layers move again.
        client.send(Rebalance([1, 3]))
        assert moved(client).counts == [1, 3]
        client.send(Stop())
        assert client.failure() is None
    for stream, prompt in prompts.items():
        assert client.tokens[stream] == expected_output(prompt, params)[0]


def test_a_slow_stage_loses_layers_by_itself(
    directory: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "_WINDOW", 32)
    monkeypatch.setattr(loop, "_BALANCE_SECONDS", 0.0)
    for name in ("patience", "dwell", "longest_dwell"):
        monkeypatch.setattr(Balancer, name, 0.0)

    def fake_times(
        self: timings.StepTimings, stage: int, steps: list[StepTime], most: int = 64
    ) -> None:
        """Stage 1 takes three times as long for a layer, whichever it has."""
        each = (0.001, 0.003)[stage]
        true = []
        for step in steps:
            busy = each * len(self._layout_of(step.number).layers(stage))
            true.append(StepTime(step.number, busy, step.began, step.ended))
        real_took(self, stage, true, most)

    real_took = timings.StepTimings.took
    monkeypatch.setattr(timings.StepTimings, "took", fake_times)
    with Client(directory, pipeline_parallel_size=2, layer_rebalance="auto") as client:
        client.ready()
        for stream in range(1, 9):
            client.send(Submit(client.request(stream, [stream, 1, 4], 80)))
        told = moved(client)
        assert (told.before, told.counts, told.slowest) == ([2, 2], [3, 1], 1)
        assert "6.00 ms" in told.why
        client.send(Stop())
        assert client.failure() is None
