"""First come, first served. A preempted sequence keeps its place by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from serving.core import Sequence
from serving.driver.order.base import Order


def _key(sequence: Sequence) -> int:
    return sequence.order_key


class FirstComeFirstServed(Order):
    def __init__(self) -> None:
        self._queue: list[Sequence] = []  # sorted by order_key, which is unique

    def push(self, sequence: Sequence) -> None:
        insort(self._queue, sequence, key=_key)

    def discard(self, sequence: Sequence) -> None:
        place = bisect_left(self._queue, sequence.order_key, key=_key)
        if place < len(self._queue) and self._queue[place] is sequence:
            del self._queue[place]

    def ranked(self, now: float) -> Iterator[Sequence]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)
