"""What every step touches, in arrays indexed by slot.

A slot belongs to one sequence from its admission until it ended and nothing in flight names it.
For a slot in use: confirmed <= planned, and planned <= known + 1: a decode may be planned while the
token it reads is still a placeholder, but only one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.core import Sequence

Int64s = NDArray[np.int64]

#: What is added to short arrays at every step: twice as quick as a plain number.
ONE = np.ones((), dtype=np.int64)


class SlotTable:
    """Arrays over `num_slots` slots.

    known: tokens whose ids are known, prompt and output. planned: tokens whose KV is computed or
    in flight. confirmed: tokens whose KV every stage has written. target: `known` at admission,
    the end of prefill. limit: prompt + max_tokens, the most tokens the sequence may have.
    last: limit - 1, the tokens planned once nothing is left to decode.
    in_flight: micro-batches in flight that name the slot. runs_to_limit: nothing ends the sequence
    before its limit. tpot: seconds that its tokens may be apart, infinite without a target.
    decoding_since: when the first of its decodes was planned, in seconds, and infinite before.
    """

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        def array(dtype: type[np.generic]) -> NDArray[np.generic]:
            return np.zeros(num_slots, dtype=dtype)

        self.num_slots = num_slots
        # Memory of `tokens` is only taken for the part of a row that is written.
        self.tokens: NDArray[np.int32] = np.zeros((num_slots, max_model_len), dtype=np.int32)
        self.known: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.planned: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.confirmed: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.target: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.limit: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.last: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.prompt_len: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.stop_from: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.in_flight: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.num_pages: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.planned_in: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.stream: Int64s = np.zeros(num_slots, dtype=np.int64)
        self.tpot = np.full(num_slots, np.inf)
        self.decoding_since = np.full(num_slots, np.inf)
        self.alive = np.zeros(num_slots, dtype=np.bool_)
        self.decoding = np.zeros(num_slots, dtype=np.bool_)
        self.heeds_eos = np.zeros(num_slots, dtype=np.bool_)
        self.has_stop_ids = np.zeros(num_slots, dtype=np.bool_)
        self.runs_to_limit = np.zeros(num_slots, dtype=np.bool_)
        self.wants_logprobs = np.zeros(num_slots, dtype=np.bool_)
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.free = list(range(num_slots - 1, -1, -1))
        self.num_alive = 0  # as a count over `alive` would say

    def __getitem__(self, slot: int) -> Sequence:
        sequence = self.sequences[slot]
        if sequence is None:
            raise AssertionError(f"slot {slot} belongs to nobody")
        return sequence

    def enter(self, sequence: Sequence, cached: int) -> int:
        """Give the sequence a slot; its first `cached` tokens are already in its pages."""
        slot = self.free.pop()
        request = sequence.request
        params = request.params
        count = len(sequence.tokens)
        sequence.slot = slot
        self.sequences[slot] = sequence
        self.tokens[slot, :count] = sequence.tokens
        self.known[slot] = self.target[slot] = count
        self.planned[slot] = self.confirmed[slot] = cached
        self.limit[slot] = sequence.prompt_len + request.max_tokens
        self.last[slot] = self.limit[slot] - 1
        self.prompt_len[slot] = sequence.prompt_len
        self.stop_from[slot] = sequence.prompt_len + params.min_tokens
        self.in_flight[slot] = 0
        self.num_pages[slot] = len(sequence.pages)
        self.planned_in[slot] = -1
        self.stream[slot] = request.stream
        tpot = request.service.tpot
        self.tpot[slot] = np.inf if tpot is None else tpot
        self.decoding_since[slot] = np.inf
        self.alive[slot] = True
        self.num_alive += 1
        self.decoding[slot] = False
        self.heeds_eos[slot] = not params.ignore_eos
        self.has_stop_ids[slot] = bool(params.stop_token_ids)
        self.runs_to_limit[slot] = params.ignore_eos and not params.stop_token_ids
        self.wants_logprobs[slot] = params.logprobs is not None
        return slot

    def retire(self, slot: int) -> None:
        """The slot's sequence ended; it keeps the slot while something in flight names it."""
        if self.alive[slot]:
            self.num_alive -= 1
        self.alive[slot] = False
        self.decoding[slot] = False

    def leave(self, slot: int) -> None:
        """The slot's sequence ended or was preempted, and nothing in flight names it."""
        if self.in_flight[slot] != 0:
            raise AssertionError(f"slot {slot} is still named by a micro-batch in flight")
        self[slot].slot = -1
        self.sequences[slot] = None
        self.retire(slot)
        self.free.append(slot)

    @property
    def num_entered(self) -> int:
        return self.num_slots - len(self.free)

    def half_done(self) -> Int64s:
        """Slots of prompts whose prefill is not planned to its end."""
        return (self.alive & ~self.decoding).nonzero()[0]

    def needs_decode(self) -> Int64s:
        """Slots past prefill that have a token left to sample which is not planned yet."""
        decoding = self.decoding.nonzero()[0]
        return decoding[self.planned[decoding] < self.last[decoding]]

    def ready_to_decode(self, needs: Int64s) -> Int64s:
        """Those of them that wait for at most one unknown token, least recently planned first."""
        ready = needs[self.planned[needs] <= self.known[needs]]
        return ready[self.planned_in[ready].argsort(kind="stable")]
