"""How many prompt tokens fit beside decodes that have to keep their target."""

from __future__ import annotations

import math

import numpy as np

from serving.driver.outlook import StepSeconds
from serving.driver.predictor import StepFeatures
from serving.driver.slots import Int64s, SlotTable

#: Answers are planned to take this share of what their targets allow.
_MARGIN = 0.95
#: Answers that are late already hold the prompts back to this share of the target, not further.
_LATE = 0.5
#: Prompts go on by so many tokens even where the targets allow none.
_LEAST = 64


class StepClock:
    """Of one micro-batch, whose decodes are chosen at time `now`.

    The target of an answer is a mean, so what earlier tokens saved may be spent: an answer of k
    tokens that took t seconds so far allows this one (k + 1) * target - t. `limit` is what all
    decodes allow, in seconds; a sequence decodes once in as many micro-batches as there are stages.
    """

    def __init__(
        self,
        step_seconds: StepSeconds,
        slots: SlotTable,
        decodes: Int64s,
        stages: int,
        now: float,
    ) -> None:
        self._step_seconds = step_seconds
        self._rows = len(decodes)
        target = _MARGIN * slots.tpot[decodes]
        done = slots.planned[decodes] - slots.target[decodes]
        allowed = target * (done + 1) - (now - slots.decoding_since[decodes])
        self.limit = float(np.minimum.reduce(np.maximum(allowed, _LATE * target))) / stages
        self._context = int(np.add.reduce(slots.planned[decodes]))
        self._new, self._pairs, self._sampled = 0, 0.0, self._rows
        self._spent: float | None = None

    def fitting(self, length: int, before: int, left: int, *, first: bool) -> int:
        """How much of a chunk of `length` tokens fits, `before` being computed of its prompt.

        At least a few tokens of the `first` chunk do; 0 means that the micro-batch is full. The
        chunk is taken to be added.
        """
        if self.limit == math.inf:
            return length
        whole = self._seconds(length, before, left)
        if whole is None:
            return length
        if whole > self.limit:
            if self._spent is None:
                self._spent = self._seconds(0, 0, 1) or 0.0
            room = max(0.0, self.limit - self._spent) / max(whole - self._spent, 1e-9)
            least = min(length, _LEAST) if first else 0
            length = max(int(length * room), least)
            if length < min(_LEAST, left) and not first:
                return 0
        self._spent = min(whole, self.limit)
        self._new += length
        self._pairs += length * (before + (length + 1) / 2)
        self._sampled += length == left
        return length

    def _seconds(self, length: int, before: int, left: int) -> float | None:
        return self._step_seconds(
            StepFeatures(
                self._new + length,
                self._pairs + length * (before + (length + 1) / 2),
                self._rows,
                self._context,
                self._sampled + (length == left),
            )
        )
