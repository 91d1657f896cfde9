"""How far the loading of weights has come, with a rate and a remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["LoadProgress", "ProgressMeter"]


@dataclass(frozen=True)
class LoadProgress:
    """A moment of loading: bytes in place, bytes in all, seconds so far."""

    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second so far."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float:
        """Seconds still to go at this rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
            f"{self.rate / 1e6:.0f} MB/s, {self.remaining:.0f} s left"
        )


class ProgressMeter:
    """Calls back at most every `interval` seconds, and once when everything is done."""

    def __init__(
        self,
        total: int,
        report: Callable[[LoadProgress], None] | None,
        interval: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._report, self._interval, self._clock = total, report, interval, clock
        self._done = 0
        self._start = self._last = clock()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are now in place."""
        self._done += num_bytes
        now = self._clock()
        if self._report and (now - self._last >= self._interval or self._done >= self._total):
            self._last = now
            self._report(LoadProgress(self._done, self._total, now - self._start))
