"""Predicts how long a stage takes for a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serving.core import MicroBatch
from serving.driver.slots import SlotTable


@dataclass(frozen=True)
class StepFeatures:
    """What a stage's time depends on.

    `new_tokens` prompt tokens; `prefill_context` pairs of a new token and a key it sees, the sum of
    n_i * L_i with L_i the mean keys of the n_i tokens; `decode_rows`, the keys they read in all,
    `decode_context`; `sampled` rows that get a token.
    """

    new_tokens: int
    prefill_context: float
    decode_rows: int
    decode_context: int
    sampled: int

    @classmethod
    def of(cls, batch: MicroBatch, slots: SlotTable) -> StepFeatures:
        """Of a micro-batch that was just chosen."""
        lengths = batch.prefill_lens
        pairs = 0.0
        new = 0
        if len(lengths):
            new = int(lengths.sum())
            ends = slots.planned[batch.prefill_slots]
            pairs = float(np.dot(lengths, ends - (lengths - 1) / 2))
        return cls(
            new_tokens=new,
            prefill_context=pairs,
            decode_rows=len(batch.decode_slots),
            decode_context=int(slots.planned[batch.decode_slots].sum()),
            sampled=len(batch.sampled),
        )
