"""Layers that move in a simulated pipeline: predictors learn from its steps, the balancer decides.

A move takes effect at the next micro-batch that is planned; what it costs is not simulated.
"""

from __future__ import annotations

import random
from collections import deque

from serving.driver.balance import Balancer, Move, stage_costs
from serving.driver.predictor import StagePredictor, StepFeatures
from serving.simulation.pipeline import Pipeline, Step


class Rebalancing:
    """Give `on_step` to the pipeline, then the pipeline to `pipeline`.

    `noise` is the relative spread of measured times about the true ones.
    """

    window = 256
    every = 32

    def __init__(self, *, noise: float = 0.0, seed: int = 0) -> None:
        self.moves: list[tuple[float, Move]] = []
        self._noise = noise
        self._random = random.Random(seed)
        self._seen: deque[StepFeatures] = deque(maxlen=self.window)
        self._steps = 0

    def attach(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        layout = pipeline.layout
        last = layout.num_stages - 1
        self.balancer = Balancer(layout)
        self.predictors = [
            StagePredictor(len(layout.layers(stage)), has_head=stage == last)
            for stage in range(last + 1)
        ]
        if last:
            self.predictors[last].like = self.predictors[0]

    def on_step(self, step: Step) -> None:
        self._seen.append(step.features)
        for predictor, began, ended in zip(self.predictors, step.began, step.ended, strict=True):
            seconds = (ended - began) * self._random.uniform(1 - self._noise, 1 + self._noise)
            predictor.observe(step.features, seconds)
        self._steps += 1
        if self._steps % self.every or len(self._seen) < self.window:
            return
        errors = [predictor.error for predictor in self.predictors]
        worst = None if None in errors else max(error for error in errors if error is not None)
        now = step.began[0]
        move = self.balancer.decide(now, stage_costs(self.predictors, self._seen), worst)
        if move is not None:
            self.moves.append((now, move))
            self._pipeline.layout = move.layout
            for stage, predictor in enumerate(self.predictors):
                predictor.layers = len(move.layout.layers(stage))
