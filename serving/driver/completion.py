"""Takes finished micro-batches: new tokens, stops, pages that became findable or free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.core import FinishReason, MicroBatch
from serving.driver.pages import extend_chain, page_chunks
from serving.driver.scheduler import Scheduler
from serving.driver.slots import ONE, Int64s
from serving.errors import EngineDeadError
from serving.messages import Ended, StepOutputs, StepResult


class Completion:
    """Applies results, in the order of the plans, to the scheduler's state."""

    def __init__(self, scheduler: Scheduler, eos_token_ids: list[int]) -> None:
        self._scheduler = scheduler
        self._eos = sorted(eos_token_ids)

    def finish(self, result: StepResult) -> tuple[MicroBatch, StepOutputs]:
        """The micro-batch that ended, and what the clients get of it.

        Raises EngineDeadError if the result is not the next one: a gap is fatal.
        """
        flight = self._scheduler.in_flight
        if not flight or flight[0].number != result.number:
            expected = flight[0].number if flight else "none"
            raise EngineDeadError(
                f"The last stage returned micro-batch {result.number} where {expected} was due."
            )
        batch = flight.popleft()
        slots = self._scheduler.slots
        slots.in_flight[batch.decode_slots] -= ONE
        slots.confirmed[batch.decode_slots] += ONE
        if len(batch.prefill_slots):
            slots.in_flight[batch.prefill_slots] -= 1
            slots.confirmed[batch.prefill_slots] += batch.prefill_lens

        tokens = np.frombuffer(result.tokens, dtype="<i4")
        if len(tokens) != len(batch.sampled):
            raise EngineDeadError(
                f"Micro-batch {batch.number} sampled {len(tokens)} tokens instead of "
                f"{len(batch.sampled)}."
            )
        sampled = batch.sampled
        rows = slots.alive[sampled].nonzero()[0]
        if len(rows) < len(sampled):
            sampled, tokens = sampled[rows], tokens[rows]
        known = slots.known[sampled]
        slots.tokens[sampled, known] = tokens
        known += ONE
        slots.known[sampled] = known
        self._scheduler.counters.generation_tokens += len(tokens)
        self._register(batch)
        stops = self._stops(sampled, tokens, known)
        ended = self._end(sampled, tokens, stops, known)
        outputs = self._outputs(result, rows, sampled, tokens, stops, ended)
        self._vacate(batch)
        return batch, outputs

    def _stops(
        self, sampled: Int64s, tokens: NDArray[np.int32], known: Int64s
    ) -> NDArray[np.bool_] | None:
        """Which tokens end their sequences by themselves, None if none can.

        `known` tokens of each sequence are there, these among them.
        """
        slots = self._scheduler.slots
        if np.count_nonzero(slots.runs_to_limit[sampled]) == len(sampled):
            return None
        stops = np.zeros(len(sampled), dtype=np.bool_)
        may_stop = known > slots.stop_from[sampled]
        for eos in self._eos:
            stops |= tokens == eos
        stops &= slots.heeds_eos[sampled] & may_stop
        for row in (slots.has_stop_ids[sampled] & may_stop).nonzero()[0]:
            wanted = slots[int(sampled[row])].request.params.stop_token_ids
            stops[row] |= int(tokens[row]) in wanted
        return stops

    def _end(
        self,
        sampled: Int64s,
        tokens: NDArray[np.int32],
        stops: NDArray[np.bool_] | None,
        known: Int64s,
    ) -> list[Ended]:
        """End the sequences that stop or have come to their limit."""
        scheduler = self._scheduler
        slots = scheduler.slots
        over = known == slots.limit[sampled]
        if stops is not None:
            over |= stops
        ended = []
        for row in over.nonzero()[0].tolist():
            sequence = slots[int(sampled[row])]
            by_token = stops is not None and bool(stops[row])
            reason: FinishReason = "stop" if by_token else "length"
            token = int(tokens[row]) if by_token else None
            ended.append(Ended(sequence.request.stream, reason, token))
            scheduler.end(sequence, reason)
        return ended

    def _outputs(
        self,
        result: StepResult,
        rows: Int64s,
        sampled: Int64s,
        tokens: NDArray[np.int32],
        stops: NDArray[np.bool_] | None,
        ended: list[Ended],
    ) -> StepOutputs:
        slots = self._scheduler.slots
        if stops is not None:  # the token that stops an answer is not part of it
            rows, sampled, tokens = rows[~stops], sampled[~stops], tokens[~stops]
        streams = slots.stream[sampled].astype("<i8", copy=False).tobytes()
        shown_tokens = tokens.astype("<i4", copy=False).tobytes()
        if not result.logprobs:
            return StepOutputs(streams=streams, tokens=shown_tokens, ended=ended)
        wanted = np.flatnonzero(slots.wants_logprobs[sampled])
        source = rows[wanted]
        shape = (len(result.tokens) // 4, result.top_k)
        return StepOutputs(
            streams=streams,
            tokens=shown_tokens,
            ended=ended,
            logprob_rows=wanted.astype("<i4").tobytes(),
            logprobs=np.frombuffer(result.logprobs, "<f4")[source].tobytes(),
            top_ids=np.frombuffer(result.top_ids, "<i4").reshape(shape)[source].tobytes(),
            top_logprobs=np.frombuffer(result.top_logprobs, "<f4").reshape(shape)[source].tobytes(),
            top_k=result.top_k,
        )

    def _register(self, batch: MicroBatch) -> None:
        """Offer pages that are now full of real tokens, written by every stage, to the cache."""
        scheduler = self._scheduler
        if not scheduler.caching:
            return
        slots, size, register = scheduler.slots, scheduler.page_size, scheduler.pool.register
        crossed = batch.decode_slots[slots.confirmed[batch.decode_slots] % size == 0]
        for slot in (*crossed.tolist(), *batch.prefill_slots.tolist()):
            if not slots.alive[slot]:
                continue
            sequence = slots[slot]
            first, full = sequence.registered, int(slots.confirmed[slot]) // size
            if first >= full:
                continue
            tokens = slots.tokens[slot]
            extend_chain(sequence.hashes, tokens, sequence.request.cache_salt, size, full)
            chunks = page_chunks(tokens, size, first, full)
            register(sequence.pages[first:full], sequence.hashes[first:full], chunks)
            sequence.registered = full

    def _vacate(self, batch: MicroBatch) -> None:
        """Return slots and pages of ended sequences that nothing in flight names any more."""
        scheduler = self._scheduler
        slots = scheduler.slots
        if slots.num_alive == slots.num_entered:
            return
        for named in (batch.decode_slots, batch.prefill_slots):
            for slot in named[~slots.alive[named]].tolist():
                sequence = slots.sequences[slot]
                if sequence is not None and slots.in_flight[slot] == 0:
                    scheduler.vacate(sequence)
