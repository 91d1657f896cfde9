"""A stage's copy of the slot arrays, kept equal to the driver's by the plans' deltas.

Numpy only: the same code builds the rows of a micro-batch for a real stage and for a fake one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.core import StepPlan
from serving.errors import EngineDeadError

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """One micro-batch, ready for the device. S rows (decodes first), T tokens, R sampled rows.

    tokens      | d0 | d1 | ... | p0 p0 p0 p0 | p1 p1 |
    query_starts  0    1    ...   D             D+4     T
    """

    number: int
    slots: Int64s  # [S]
    num_decodes: int
    positions: Int64s  # [T]
    slot_mapping: Int64s  # [T]
    query_starts: Int32s  # [S + 1]
    context_lens: Int32s  # [S]
    page_tables: Int32s  # [S, longest]
    prompt_tokens: Int64s  # [T - D], first stage only
    sampled_slots: Int64s  # [R]
    sampled_tokens: Int64s  # [R] index into T of the row whose logits are sampled
    sampled_positions: Int64s  # [R] absolute index of the token that is sampled
    reads_from: int  # number of the micro-batch whose tokens the decodes need, or -1


class Mirror:
    """Slot arrays of one stage. `holds_tokens` is true on the first stage."""

    def __init__(
        self, num_slots: int, max_model_len: int, page_size: int, *, holds_tokens: bool
    ) -> None:
        self.page_size = page_size
        self._next_number = 0
        self._computed: Int64s = np.zeros(num_slots, dtype=np.int64)
        self._total: Int64s = np.zeros(num_slots, dtype=np.int64)
        self._token_from: Int64s = np.full(num_slots, -1, dtype=np.int64)
        self._page_table = np.zeros((num_slots, -(-max_model_len // page_size)), dtype=np.int32)
        self._tokens: list[Int32s | None] = [None] * num_slots
        self._holds_tokens = holds_tokens

    def apply(self, plan: StepPlan) -> Rows:
        """Bring the mirror up to the plan and lay out its rows.

        Raises EngineDeadError on a gap in the numbers: the mirror would no longer be true.
        """
        if plan.number != self._next_number:
            raise EngineDeadError(
                f"Plan {plan.number} arrived where plan {self._next_number} was due."
            )
        self._next_number += 1
        self._apply_deltas(plan)

        decodes = np.frombuffer(plan.decode_slots, dtype="<u2").astype(np.int64)
        chunks = np.frombuffer(plan.prefill_slots, dtype="<u2").astype(np.int64)
        lengths = np.frombuffer(plan.prefill_lens, dtype="<u4").astype(np.int64)
        num_decodes = len(decodes)
        reads_from = int(self._token_from[decodes].max(initial=-1))
        slots = np.concatenate((decodes, chunks))
        counts = np.ones(len(slots), dtype=np.int64)
        counts[num_decodes:] = lengths
        ends = np.cumsum(counts)
        starts = ends - counts
        before = self._computed[slots]
        prompt_tokens = self._prompt_tokens(chunks, before[num_decodes:], lengths)

        # positions of row i: before[i] ... before[i] + counts[i] - 1
        positions = np.arange(ends[-1]) + np.repeat(before - starts, counts)
        columns = positions // self.page_size
        pages = self._page_table[np.repeat(slots, counts), columns].astype(np.int64)
        context = before + counts
        self._computed[slots] = context

        whole = context >= self._total[slots]
        whole[:num_decodes] = True
        sampled = np.flatnonzero(whole)
        self._token_from[slots[sampled]] = plan.number
        longest = -(-int(context.max()) // self.page_size)
        return Rows(
            number=plan.number,
            slots=slots,
            num_decodes=num_decodes,
            positions=positions,
            slot_mapping=pages * self.page_size + positions % self.page_size,
            query_starts=np.concatenate(([0], ends)).astype(np.int32),
            context_lens=context.astype(np.int32),
            page_tables=self._page_table[slots, :longest],
            prompt_tokens=prompt_tokens,
            sampled_slots=slots[sampled],
            sampled_tokens=ends[sampled] - 1,
            sampled_positions=context[sampled],
            reads_from=reads_from,
        )

    def _apply_deltas(self, plan: StepPlan) -> None:
        for slot in np.frombuffer(plan.released, dtype="<u2").tolist():
            self._tokens[slot] = None
        for admission in plan.admitted:
            slot = admission.slot
            self._computed[slot] = admission.computed
            self._total[slot] = admission.num_tokens
            self._token_from[slot] = -1
            if self._holds_tokens:
                self._tokens[slot] = np.frombuffer(admission.tokens, dtype="<i4")
        if plan.page_slots:
            rows = np.frombuffer(plan.page_slots, dtype="<u2")
            columns = np.frombuffer(plan.page_columns, dtype="<u4")
            self._page_table[rows, columns] = np.frombuffer(plan.page_ids, dtype="<u4")

    def _prompt_tokens(self, slots: Int64s, starts: Int64s, lengths: Int64s) -> Int64s:
        if not self._holds_tokens or not len(slots):
            return np.zeros(0, dtype=np.int64)
        parts = []
        for slot, start, length in zip(
            slots.tolist(), starts.tolist(), lengths.tolist(), strict=True
        ):
            tokens = self._tokens[slot]
            if tokens is None:
                raise EngineDeadError(f"A plan prefills slot {slot}, which has no tokens.")
            parts.append(tokens[start : start + length])
        return np.concatenate(parts).astype(np.int64)
