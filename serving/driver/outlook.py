"""What is left of a prompt to prefill, and how long that will take.

A prompt's own prefill is reckoned in whole micro-batches beside the decodes that run now: a price
for each token, which holds the prompt's share of everything a micro-batch costs, and a price for
each pair of a new token and a key it sees. Both are read off the step times that are predicted
for two micro-batches, and read again every few dozen of them.
"""

from __future__ import annotations

from collections.abc import Callable

from serving.core import Sequence
from serving.driver.pages import PagePool, extend_chain
from serving.driver.predictor import StepFeatures
from serving.driver.slots import SlotTable

#: Seconds that the slowest stage takes for a micro-batch; None where nothing is known yet.
StepSeconds = Callable[[StepFeatures], float | None]

#: Seconds a token while nothing is known: of the right size for one GPU and a small model.
_UNKNOWN = 1e-4
_REFRESH = 32


class Outlook:
    """Of one scheduler. `max_tokens` are those of a full micro-batch."""

    def __init__(
        self,
        slots: SlotTable,
        pool: PagePool,
        *,
        caching: bool,
        max_tokens: int,
        step_seconds: StepSeconds,
    ) -> None:
        self.step_seconds = step_seconds
        self._slots = slots
        self._pool = pool
        self.caching = caching
        self._max_tokens = max_tokens
        self._age = 0
        self.version = 0
        """Counts the times that prices changed."""
        self._price()

    def look(self, sequence: Sequence) -> None:
        """Find out how much of a sequence the prefix cache holds now. Changes nothing in it."""
        if not self.caching or sequence.slot >= 0:
            return
        size = self._pool.page_size
        full = (len(sequence.tokens) - 1) // size
        if len(sequence.hashes) < full:
            extend_chain(sequence.hashes, sequence.tokens, sequence.request.cache_salt, size, full)
        sequence.hit_pages = self._pool.covered(sequence.hashes, full, sequence.hit_pages)

    def begun(self) -> list[Sequence]:
        """Who has a slot and a part of the prefill not planned yet."""
        return [self._slots[slot] for slot in self._slots.half_done().tolist()]

    def left(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens still to prefill, and tokens before them."""
        slot = sequence.slot
        if slot >= 0:
            done = int(self._slots.planned[slot])
            return int(self._slots.target[slot]) - done, done
        done = sequence.hit_pages * self._pool.page_size
        return len(sequence.tokens) - done, done

    def seconds(self, sequence: Sequence) -> float:
        """Predicted seconds of what is left of a prefill if nobody else's is in the way."""
        tokens, before = self.left(sequence)
        return tokens * (self._token + self._pair * (before + tokens / 2))

    def alone(self, tokens: int, before: int = 0) -> float:
        """Predicted seconds of a prefill in an engine that does nothing else."""
        return tokens * (self._lone_token + self._lone_pair * (before + tokens / 2))

    def note_micro_batch(self) -> None:
        """One more was chosen; prices follow the load."""
        self._age += 1
        if self._age >= _REFRESH:
            self._age = 0
            self._price()

    def _price(self) -> None:
        decoding = self._slots.decoding
        rows = int(decoding.sum())
        context = int(self._slots.planned[decoding].sum()) if rows else 0
        self._token, self._pair = self._prices(rows, context)
        self._lone_token, self._lone_pair = self._prices(0, 0)
        self.version += 1

    def _prices(self, rows: int, context: int) -> tuple[float, float]:
        new = max(self._max_tokens - rows, self._max_tokens // 4, 1)
        pairs = new * new / 2
        near = self.step_seconds(StepFeatures(new, pairs, rows, context, rows + 1))
        far = self.step_seconds(StepFeatures(new, pairs + new * 1e4, rows, context, rows + 1))
        if near is None or far is None or near <= 0:
            return _UNKNOWN, 0.0
        pair = max(0.0, far - near) / (new * 1e4)
        return max(near - pair * pairs, 0.2 * near) / new, pair
