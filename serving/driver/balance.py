"""Decides which stage should own which layers, from predicted times of late micro-batches.

The slowest stage sets the pace of a pipeline, so the best layout makes the slowest stage's mean
time over the window least. A decision is plain computation: how layers move is not its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from serving.core import Layout
from serving.driver.predictor import (
    NUM_LAYER,
    StagePredictor,
    StepFeatures,
    head_vector,
    layer_vector,
)


@dataclass(frozen=True)
class StageCost:
    """Mean seconds of a micro-batch of the window: of one layer, and whatever the layers are."""

    layer: float
    fixed: float

    def seconds(self, layers: int) -> float:
        return self.fixed + layers * self.layer


def stage_costs(
    predictors: Sequence[StagePredictor], window: Sequence[StepFeatures]
) -> list[StageCost]:
    """What the window costs each stage. A slower or disturbed device shows in its own layers."""
    # Times are linear in the features, so the mean time is that of the mean features.
    layer = np.mean([layer_vector(step) for step in window], axis=0)
    head = np.mean([head_vector(step) for step in window], axis=0)
    return [
        StageCost(
            layer=float(np.dot(layer, predictor.coefficients[:NUM_LAYER])),
            # What was learnt in earlier runs holds a head's coefficients, whoever owns it now.
            fixed=float(np.dot(head, predictor.coefficients[NUM_LAYER:]))
            if predictor.has_head
            else 0.0,
        )
        for predictor in predictors
    ]


def slowest(costs: Sequence[StageCost], counts: Sequence[int]) -> float:
    """Seconds of the slowest stage when stage i owns `counts[i]` layers."""
    return max(cost.seconds(count) for cost, count in zip(costs, counts, strict=True))


def best_counts(costs: Sequence[StageCost], windows: Sequence[range]) -> list[int]:
    """Layers of each stage that make the slowest one fastest, and of all such the ones with the
    smallest sum of squared times. `windows` say where each bound may lie (`Layout.windows`).
    """
    least, _ = _search(costs, windows, max)
    limit = least * (1 + 1e-9)

    def squares(total: float, seconds: float) -> float:
        return total + seconds * seconds if seconds <= limit else math.inf

    _, bounds = _search(costs, windows, squares)
    return [end - start for start, end in pairwise(bounds)]


def _search(
    costs: Sequence[StageCost],
    windows: Sequence[range],
    weigh: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The bounds of least weight, stage by stage: each end has its best way from the first layer.
    `weigh` adds a stage's seconds to the weight of the stages before."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for cost, window in zip(costs, windows[1:], strict=True):
        best = {
            end: min(
                (weigh(weight, cost.seconds(end - start)), [*bounds, end])
                for start, (weight, bounds) in best.items()
                if start < end
            )
            for end in window
            if end > min(best)
        }
    return best[windows[-1][0]]


def layers_moved(before: Layout, after: Layout) -> int:
    """Layers whose stage differs, each counted once however far it goes."""
    return sum(
        sum(1 for layer in after.layers(stage) if layer not in before.layers(stage))
        for stage in range(after.num_stages)
    )


@dataclass(frozen=True)
class Move:
    """A new layout, and why: seconds of the slowest stage before and after, as predicted, and which
    stage that is before."""

    layout: Layout
    before: float
    after: float
    slowest: int

    @property
    def gain(self) -> float:
        return 1 - self.after / self.before

    def sentence(self) -> str:
        return (
            f"layers move to {self.layout.counts}: the slowest stage takes "
            f"{1000 * self.before:.2f} ms a micro-batch and is predicted to take "
            f"{1000 * self.after:.2f} ms"
        )


class Balancer:
    """Asked now and then with the window of the moment; says when a move is worth it.

    A move must promise at least `margin` (more where predictions are worse than that), the same
    candidate must have promised it for `patience` seconds, and what is won until the next move is
    expected must be `times_cost` times what moving costs. Moves are at least `dwell` seconds apart;
    one that goes back on the last doubles that, so that a load that changes faster than it pays to
    follow is followed less and less. Who has not been asked for `memory` seconds begins anew: while
    there is no load nothing is promised.
    """

    margin = 0.03
    patience = 1.0
    dwell = 2.0
    longest_dwell = 120.0
    times_cost = 2.0
    memory = 5.0

    def __init__(
        self,
        layout: Layout,
        *,
        windows: Sequence[range] | None = None,
        seconds_a_layer: float = 0.01,
    ) -> None:
        """`windows` say where each bound may lie; by default anywhere. `seconds_a_layer`: of the
        whole pipeline's time that moving one layer costs."""
        self.layout = layout
        self._windows = windows or layout.windows(layout.bounds[-1])
        self._seconds_a_layer = seconds_a_layer
        self._dwell = self.dwell
        self._moved_at: float | None = None
        self._before_last: list[int] | None = None
        self._candidate: list[int] | None = None
        self._since = self._asked = 0.0

    def decide(self, now: float, costs: Sequence[StageCost], error: float | None) -> Move | None:
        """A move that is worth it at `now` (seconds), or None. `error` is that of the predictions;
        None, nothing known yet, moves nothing.
        """
        asked, self._asked = self._asked, now
        if error is None or now - asked > self.memory:
            self._candidate = None
        if error is None:
            return None
        current = self.layout.counts
        best = best_counts(costs, self._windows)
        before = slowest(costs, current)
        needed = 1 - max(self.margin, error)
        kept = self._candidate
        if kept is not None and slowest(costs, best) > slowest(costs, kept) * (1 - self.margin):
            best = kept  # as good as the one that has been waited for
        after = slowest(costs, best)
        if best == current or after > before * needed:
            self._candidate = None
            return None
        if best != kept:
            self._candidate, self._since = best, now
        if now - self._since < self.patience:
            return None
        if self._moved_at is not None and now - self._moved_at < self._dwell:
            return None
        layout = Layout.of_counts(best)
        # What has lasted is expected to last as long again.
        won = (1 - after / before) * max(self._dwell, now - self._since)
        if won < self.times_cost * self._seconds_a_layer * layers_moved(self.layout, layout):
            return None
        times = [cost.seconds(count) for cost, count in zip(costs, current, strict=True)]
        layout = Layout(self.layout.epoch + 1, layout.bounds)
        return self._move(now, Move(layout, before, after, times.index(before)))

    def _move(self, now: float, move: Move) -> Move:
        current, after = self.layout.counts, move.layout.counts
        if self._before_last is not None and _goes_back(self._before_last, current, after):
            self._dwell = min(self.longest_dwell, 2 * self._dwell)
        else:
            self._dwell = max(self.dwell, self._dwell / 2)
        self._before_last, self._moved_at = current, now
        self._candidate = None
        self.layout = move.layout
        return move


def _goes_back(first: list[int], second: list[int], third: list[int]) -> bool:
    """Whether the second of two moves takes back a part of the first."""
    return any((b - a) * (c - b) < 0 for a, b, c in zip(first, second, third, strict=True))
