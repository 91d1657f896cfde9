"""First come, first served. A preempted sequence keeps its place by arrival."""

from __future__ import annotations

from serving.core import Sequence
from serving.driver.order.base import KeyedOrder


class FirstComeFirstServed(KeyedOrder):
    def key(self, sequence: Sequence) -> float:
        return 0.0
