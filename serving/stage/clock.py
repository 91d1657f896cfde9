"""Where a stage's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from serving.messages import StageSeconds, StepTime

State = Literal["wait_input", "wait_link", "idle"]


class StageClock:
    """Splits all time between four states; what is not spent waiting is busy."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waits = {"wait_input": 0.0, "wait_link": 0.0, "idle": 0.0}
        self.begin()

    @contextmanager
    def waiting(self, state: State) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waits[state] += time.perf_counter() - started
            if state == "wait_input":
                self._began = time.monotonic()

    def begin(self) -> None:
        """A step begins. It has its input from here on, or from the last wait in it."""
        self._before = self.seconds()
        self._began = time.monotonic()

    def step(self, number: int) -> StepTime:
        """The step that ends now. What it waited for its link counts as after its end."""
        now, spent, before = time.monotonic(), self.seconds(), self._before
        linked = spent.wait_link - before.wait_link
        return StepTime(number, spent.busy - before.busy, self._began, now - linked)

    def add(self, state: State, seconds: float) -> None:
        self._waits[state] += seconds

    def seconds(self) -> StageSeconds:
        total = time.perf_counter() - self._started
        return StageSeconds(busy=max(0.0, total - sum(self._waits.values())), **self._waits)
