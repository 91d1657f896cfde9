"""The contract of an order policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from serving.core import Sequence


class Order(ABC):
    """Holds every sequence whose prefill is not planned to its end yet, waiting or running.

    The scheduler asks again for every micro-batch, so a policy may change its mind at every chunk.
    `order_key` is a sequence's rank of arrival and stays its own through preemptions.
    """

    @abstractmethod
    def push(self, sequence: Sequence) -> None:
        """A sequence arrived, or was preempted and must be computed again."""

    @abstractmethod
    def discard(self, sequence: Sequence) -> None:
        """A sequence needs no more prefill. Never called while `ranked` is being iterated."""

    @abstractmethod
    def ranked(self, now: float) -> Iterator[Sequence]:
        """Sequences in the order of service at time `now` (seconds); the caller stops early."""

    @abstractmethod
    def __len__(self) -> int: ...
