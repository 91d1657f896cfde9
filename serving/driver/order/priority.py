"""By the priority that a request names, smaller first; equal ones by arrival."""

from __future__ import annotations

from serving.core import Sequence
from serving.driver.order.base import KeyedOrder


class Priority(KeyedOrder):
    def key(self, sequence: Sequence) -> float:
        return sequence.request.service.priority
