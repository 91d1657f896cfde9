"""Where a stage's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from serving.messages import StageSeconds

State = Literal["wait_input", "wait_link", "idle"]


class StageClock:
    """Splits all time between four states; what is not spent waiting is busy."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waits = {"wait_input": 0.0, "wait_link": 0.0, "idle": 0.0}

    @contextmanager
    def waiting(self, state: State) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waits[state] += time.perf_counter() - started

    def add(self, state: State, seconds: float) -> None:
        self._waits[state] += seconds

    def seconds(self) -> StageSeconds:
        total = time.perf_counter() - self._started
        return StageSeconds(busy=max(0.0, total - sum(self._waits.values())), **self._waits)
