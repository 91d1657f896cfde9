"""The contract of an order policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator

from serving.core import Sequence
from serving.driver.slots import Int64s


class Order(ABC):
    """Holds every sequence whose prefill is not planned to its end yet, waiting or running.

    The scheduler asks again for every micro-batch, so a policy may change its mind at every chunk.
    `order_key` is a sequence's rank of arrival and stays its own when it is put back. With
    `keeps_targets` the scheduler keeps micro-batches short enough for the decodes in them, and a
    prompt whose beginning is being computed for another one waits for that.
    """

    keeps_targets = False

    @abstractmethod
    def push(self, sequence: Sequence) -> None:
        """A sequence arrived, or was put back and must be computed again."""

    @abstractmethod
    def discard(self, sequence: Sequence) -> None:
        """A sequence needs no more prefill. Never called while `ranked` is being iterated."""

    @abstractmethod
    def ranked(self, now: float) -> Iterator[Sequence]:
        """Sequences in the order of service at time `now` (seconds); the caller stops early."""

    @abstractmethod
    def __len__(self) -> int: ...

    def served(self, sequence: Sequence, tokens: int) -> None:
        """So many prompt tokens of a sequence are in the micro-batch that was just planned."""
        return

    def decoded(self, slots: Int64s) -> None:
        """These slots decode one token each in the micro-batch that was just planned."""
        return


class KeyedOrder(Order):
    """An order by a key that a sequence keeps while it is queued, ties by arrival."""

    def __init__(self) -> None:
        self._queue: list[Sequence] = []
        self._places: list[tuple[float, int]] = []  # (key, rank of arrival), sorted; unique
        self._keys: dict[int, float] = {}  # by rank of arrival

    @abstractmethod
    def key(self, sequence: Sequence) -> float:
        """Smaller is sooner."""

    def push(self, sequence: Sequence) -> None:
        key = self._keys[sequence.order_key] = self.key(sequence)
        place = bisect_left(self._places, (key, sequence.order_key))
        self._places.insert(place, (key, sequence.order_key))
        self._queue.insert(place, sequence)

    def discard(self, sequence: Sequence) -> None:
        key = self._keys.pop(sequence.order_key, None)
        if key is not None:
            place = bisect_left(self._places, (key, sequence.order_key))
            del self._places[place], self._queue[place]

    def ranked(self, now: float) -> Iterator[Sequence]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)
