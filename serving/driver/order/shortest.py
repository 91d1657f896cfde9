"""Shortest prompt first, by its length alone: what is cached or done already does not count."""

from __future__ import annotations

from serving.core import Sequence
from serving.driver.order.base import KeyedOrder


class ShortestFirst(KeyedOrder):
    def key(self, sequence: Sequence) -> float:
        return len(sequence.tokens)
