"""Longest cached prefix first, as in SGLang: it makes most of the prefix cache.

Prompts that are begun go on first, so that few are half done at a time. A long queue is served by
arrival, since looking through all of it would cost more than it brings.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.core import Sequence
from serving.driver.order.base import Order
from serving.driver.outlook import Outlook


class LongestPrefixFirst(Order):
    longest_queue = 128

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._queue: dict[int, Sequence] = {}  # by rank of arrival

    def push(self, sequence: Sequence) -> None:
        self._queue[sequence.order_key] = sequence

    def discard(self, sequence: Sequence) -> None:
        self._queue.pop(sequence.order_key, None)

    def ranked(self, now: float) -> Iterator[Sequence]:
        queue = self._queue.values()
        if len(queue) > self.longest_queue:
            return iter(sorted(queue, key=lambda one: (one.slot < 0, one.order_key)))
        for sequence in queue:
            self._outlook.look(sequence)
        return iter(sorted(queue, key=lambda one: (one.slot < 0, -one.hit_pages, one.order_key)))

    def __len__(self) -> int:
        return len(self._queue)
