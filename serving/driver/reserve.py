"""The pages that sequences already running will still take.

A prompt is let in only when, at the worst moment to come, everybody who runs then still finds a
page. How long an answer gets is known exactly for a request that ignores the end-of-sequence token;
for others it is read off the answers that ended lately: the length that a share of those answers
longer than the present one stayed under. That share grows by preemptions and shrinks while there
are none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.driver.slots import Int64s, SlotTable

_REMEMBERED = 512
#: Stands for answers before any has ended.
_FIRST_LENGTHS = (32, 128, 256, 512)


class Reserve:
    """How many pages to keep back. `share` is the quantile of answer lengths that is assumed."""

    #: The step up and down are those of token throttling in gLLM (0.0.7), the limits our own.
    least, most = 0.5, 0.98
    up, down = 0.05, 0.002

    def __init__(self, page_size: int) -> None:
        self.share = 0.7
        self._page_size = page_size
        self._lengths: NDArray[np.int64] = np.zeros(_REMEMBERED, dtype=np.int64)
        self._lengths[: len(_FIRST_LENGTHS)] = _FIRST_LENGTHS
        self._noted = len(_FIRST_LENGTHS)
        self._sorted: Int64s = np.array(_FIRST_LENGTHS, dtype=np.int64)

    # ---- what happened

    def note_answer(self, length: int) -> None:
        """An answer ended by itself after so many tokens."""
        self._lengths[self._noted % _REMEMBERED] = length
        self._noted += 1
        self._sorted = np.zeros(0, dtype=np.int64)

    def note_preemption(self) -> None:
        self.share = min(self.most, self.share + self.up)

    def note_micro_batch(self) -> None:
        self.share = max(self.least, self.share - self.down)

    # ---- what is to come

    def expected(self, written: Int64s, limit: Int64s, exact: NDArray[np.bool_]) -> Int64s:
        """Tokens each answer will still get: `written` are there, `limit` the most it may have.

        `exact` answers always reach their limit.
        """
        if not len(self._sorted):
            self._sorted = np.sort(self._lengths[: min(self._noted, _REMEMBERED)])
        known = self._sorted
        longer = np.searchsorted(known, written, side="right")
        place = longer + ((len(known) - longer) * self.share).astype(np.int64)
        # An answer longer than all of late is taken to get half as long again.
        beyond = written + (written >> 1) + 1
        total = np.where(longer < len(known), known[np.minimum(place, len(known) - 1)], beyond)
        total = np.where(exact, limit, np.minimum(total, limit))
        left: Int64s = np.maximum(total - written, 0)
        return left

    def running(self, slots: SlotTable) -> tuple[Int64s, Int64s]:
        """Pages held by each running sequence, and the tokens that it will still write."""
        alive = np.flatnonzero(slots.alive)
        prompt = slots.prompt_len[alive]
        written = slots.known[alive] - prompt
        left = self.expected(written, slots.limit[alive] - prompt, slots.runs_to_limit[alive])
        return slots.num_pages[alive], left

    def needed(self, held: Int64s, left: Int64s) -> int:
        """Pages beyond those held now that are in use at the worst moment to come.

        Each sequence writes one token a round and lets go of its pages when it ends, so use is
        highest just before one of them ends. How full everybody's last page is then is not
        followed up: the error of n such roundings is under the root of n in practice all the time.
        """
        if not len(held):
            return 0
        order = np.argsort(left, kind="stable")
        left = left[order]
        held_by_rest = np.cumsum(held[order][::-1])[::-1]
        rest = np.arange(len(held), 0, -1)
        margin = np.ceil(np.sqrt(rest)).astype(np.int64)
        peak = int((held_by_rest + -(-(rest * left) // self._page_size) + margin).max())
        return max(0, peak - int(held.sum()))
