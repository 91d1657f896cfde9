"""Layouts by predicted times: the choice itself, and when it is acted on."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core import Layout
from serving.driver.balance import (
    Balancer,
    StageCost,
    best_counts,
    layers_moved,
    slowest,
    stage_costs,
)
from serving.driver.predictor import NUM_HEAD, NUM_LAYER, StagePredictor, StepFeatures


def costs(*layer: float, head: float = 0.0) -> list[StageCost]:
    """Milliseconds a layer of each stage, and of the head on the last."""
    return [
        StageCost(0.001 * one, 0.001 * head if stage == len(layer) - 1 else 0.0)
        for stage, one in enumerate(layer)
    ]


COSTS = st.lists(
    st.builds(StageCost, layer=st.floats(1e-4, 1e-2), fixed=st.floats(0, 2e-2)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(4, 14), st.integers(0, 14))
def test_no_layout_that_is_allowed_has_a_faster_slowest_stage(
    stages: list[StageCost], layers: int, movable: int
) -> None:
    windows = Layout.even(layers, len(stages)).windows(movable)
    every = [
        [end - start for start, end in itertools.pairwise(bounds)]
        for bounds in itertools.product(*windows)
        if all(start < end for start, end in itertools.pairwise(bounds))
    ]
    found = best_counts(stages, windows)
    assert found in every
    assert slowest(stages, found) <= min(slowest(stages, one) for one in every) * (1 + 1e-9)


def test_a_heavy_head_makes_a_light_tail_and_a_slow_stage_gets_fewer_layers() -> None:
    anywhere = Layout.even(36, 4).windows(36)
    assert best_counts(costs(1, 1, 1, 1, head=3.2), anywhere) == [10, 10, 10, 6]
    assert best_counts(costs(1, 1, 1, 1), anywhere) == [9, 9, 9, 9]
    assert best_counts(costs(1, 1.3, 1, 1), anywhere) == [10, 6, 10, 10]
    near = Layout.even(36, 4).windows(1)
    assert best_counts(costs(1, 1, 1, 1, head=3.2), near)[3] == 8


def test_costs_are_the_means_of_the_window() -> None:
    source = random.Random(3)
    predictors = [StagePredictor(4, has_head=False), StagePredictor(4, has_head=True)]
    window = []
    for _ in range(300):
        rows = source.randrange(1, 60)
        step = StepFeatures(0, 0.0, rows, rows * source.randrange(50, 500), rows)
        window.append(step)
        predictors[0].observe(step, 4 * (1e-4 + 1e-9 * step.decode_context))
        predictors[1].observe(step, 4 * (2e-4 + 1e-9 * step.decode_context) + 1e-3)
    first, last = stage_costs(predictors, window)
    assert first.fixed == 0
    for cost, predictor in ((first, predictors[0]), (last, predictors[1])):
        mean = sum(predictor.predict(step) for step in window) / len(window)
        assert 4 * cost.layer + cost.fixed == pytest.approx(mean, rel=1e-6)


def test_a_head_that_was_learnt_in_an_earlier_run_costs_the_last_stage_alone() -> None:
    predictors = [StagePredictor(4, has_head=False), StagePredictor(4, has_head=True)]
    for predictor in predictors:
        predictor.start_from(np.full(NUM_LAYER + NUM_HEAD, 1e-4))
    first, last = stage_costs(predictors, [StepFeatures(0, 0.0, 32, 4000, 32)])
    assert first.layer == last.layer > 0
    assert first.fixed == 0 < last.fixed


def test_layers_that_change_their_stage_are_counted_once() -> None:
    before = Layout.of_counts([9, 9, 9, 9])
    assert layers_moved(before, before) == 0
    assert layers_moved(before, Layout.of_counts([9, 10, 9, 8])) == 2
    assert layers_moved(before, Layout.of_counts([10, 10, 9, 7])) == 5


HEAVY = costs(1, 1, 1, 1, head=3.2)
EVEN = costs(1, 1, 1, 1)


def balancer() -> Balancer:
    return Balancer(Layout.even(36, 4))


def first_move(one: Balancer, stages: list[StageCost], start: float, end: float) -> float | None:
    """When it moves, asked every 0.1 s."""
    for tick in range(round((end - start) * 10)):
        now = start + tick / 10
        if one.decide(now, stages, 0.02) is not None:
            return now
    return None


def test_a_gain_must_last_before_layers_move() -> None:
    one = balancer()
    assert one.decide(0.0, HEAVY, 0.02) is None
    assert one.decide(0.9, HEAVY, 0.02) is None
    move = one.decide(1.1, HEAVY, 0.02)
    assert move is not None
    assert move.layout.counts == one.layout.counts == [10, 10, 10, 6]
    assert move.layout.epoch == 1
    assert move.gain == pytest.approx(1 - 10.0 / 12.2)
    assert "[10, 10, 10, 6]" in move.sentence()
    assert "12.20 ms" in move.sentence()


def test_time_without_a_load_is_no_patience() -> None:
    one = balancer()
    assert one.decide(0.0, HEAVY, 0.02) is None
    assert one.decide(3600.0, HEAVY, 0.02) is None
    assert first_move(one, HEAVY, 3600.1, 3610) == pytest.approx(3601.1, abs=0.15)


def test_a_gain_that_comes_and_goes_moves_nothing() -> None:
    one = balancer()
    for tick in range(200):
        stages = HEAVY if tick % 8 < 6 else EVEN
        assert one.decide(tick / 10, stages, 0.02) is None


def test_nothing_moves_without_knowledge_or_for_less_than_the_error_of_predictions() -> None:
    one = balancer()
    for tick in range(100):
        assert one.decide(tick / 10, HEAVY, None) is None
        assert one.decide(tick / 10, HEAVY, 0.2) is None
        assert one.decide(tick / 10, costs(1, 1, 1, 1, head=0.2), 0.0) is None


def test_layers_move_no_further_than_stages_hold_them() -> None:
    layout = Layout.even(36, 4)
    one = Balancer(layout, windows=layout.windows(1))
    assert first_move(one, HEAVY, 0, 60) is not None
    assert one.layout.counts == [9, 9, 10, 8]
    assert first_move(one, HEAVY, 60, 120) is None


def test_a_dear_move_waits_until_its_gain_has_lasted_longer() -> None:
    cheap = first_move(Balancer(Layout.even(36, 4), seconds_a_layer=0.001), HEAVY, 0, 60)
    dear = first_move(Balancer(Layout.even(36, 4), seconds_a_layer=0.1), HEAVY, 0, 60)
    assert cheap == pytest.approx(1.0)
    assert dear is not None
    # 18 % of the waiting time must be twice 6 layers at 0.1 s.
    assert dear == pytest.approx(2 * 0.6 / 0.18, abs=0.2)


def test_a_load_that_changes_faster_than_it_pays_to_follow_is_followed_less_and_less() -> None:
    one = balancer()
    moves = []
    for tick in range(6000):
        now = tick / 10
        stages = HEAVY if int(now / 5) % 2 else EVEN
        if one.decide(now, stages, 0.02) is not None:
            moves.append(now)
    first, second = (sum(low <= at < low + 300 for at in moves) for low in (0, 300))
    assert first > 0
    assert second < first
    assert len(moves) < 30  # of 119 changes


def test_a_slow_change_is_always_followed() -> None:
    one = balancer()
    for phase in range(8):
        stages = HEAVY if phase % 2 == 0 else EVEN
        assert first_move(one, stages, 200.0 * phase, 200.0 * phase + 150) is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=4), st.floats(0, 5), st.integers(0, 999))
def test_on_a_stationary_load_layers_move_at_most_twice_and_never_back(
    speeds: list[float], head: float, seed: int
) -> None:
    """Costs within 2 % of their means."""
    source = random.Random(seed)
    one = Balancer(Layout.even(36, len(speeds)))
    visited = [one.layout.counts]
    for tick in range(600):
        noisy = [
            StageCost(cost.layer * source.uniform(0.99, 1.01), cost.fixed)
            for cost in costs(*speeds, head=head)
        ]
        move = one.decide(tick / 10, noisy, 0.02)
        if move is not None:
            visited.append(move.layout.counts)
    assert len(visited) <= 3
    assert len({tuple(layout) for layout in visited}) == len(visited)
