"""Chooses micro-batches: continuous batching, chunked prefill, preemption by recomputation.

The scheduler is plain computation: no sockets, no clock, no model. The driver process runs it
against stages; a simulation may run it against predicted times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from struct import pack

import numpy as np

from serving.config.engine import EngineConfig
from serving.core import Admission, MicroBatch, Request, Sequence, StepPlan
from serving.driver.order import make_order
from serving.driver.outlook import Outlook, StepSeconds
from serving.driver.pages import PagePool, extend_chain
from serving.driver.reserve import Reserve
from serving.driver.slots import ONE, Int64s, SlotTable
from serving.driver.step_clock import StepClock
from serving.driver.throttle import Load, make_throttle
from serving.messages import Admitted

_NOTHING: Int64s = np.zeros(0, dtype=np.int64)


def _packed(numbers: list[int], code: str) -> bytes:
    """As little-endian bytes; most of a plan's lists are empty most of the time."""
    return pack(f"<{len(numbers)}{code}", *numbers) if numbers else b""


@dataclass
class Draft:
    """The plan being written: what changed since the last one."""

    admitted: list[Admission] = field(default_factory=list)
    page_slots: list[int] = field(default_factory=list)
    page_columns: list[int] = field(default_factory=list)
    page_ids: list[int] = field(default_factory=list)


@dataclass
class Counters:
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})


class Scheduler:
    """State of all sequences, and the choice of what runs next.

    `depth` micro-batches may be in flight, one more than there are stages, so that every stage
    holds the plan of its next micro-batch before it finished the last. `step_seconds` predicts how
    long the slowest stage takes for a micro-batch; by default nothing is known of that.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_model_len: int,
        step_seconds: StepSeconds = lambda _: None,
    ) -> None:
        self.stages = config.pipeline_parallel_size
        self.depth = self.stages + 1
        self.page_size = config.page_size
        self.max_rows = min(config.max_num_seqs, config.max_num_batched_rows or config.max_num_seqs)
        self.caching = config.enable_prefix_caching
        self.slots = SlotTable(config.max_num_seqs, max_model_len)
        self.pool = PagePool(
            num_pages, config.page_size, evict_fifo=config.cache_eviction == "fifo"
        )
        self.outlook = Outlook(
            self.slots,
            self.pool,
            caching=self.caching,
            max_tokens=config.max_num_batched_tokens,
            step_seconds=step_seconds,
        )
        self.order = make_order(config, self.outlook)
        self.throttle = make_throttle(config)
        self.reserve = Reserve(config.page_size)
        self.in_flight: deque[MicroBatch] = deque()
        self.streams: dict[int, Sequence] = {}
        self.counters = Counters()
        self.admitted: list[Admitted] = []  # first admissions since the client was last told
        self.epoch = 0
        self._released: list[int] = []
        self._arrivals = 0
        self._next_number = 0
        self._turn = 0
        self._waiting_tokens = 0
        self._entered_tokens = 0  # of them, those whose sequences hold their pages

    def begin(self, warm: Scheduler) -> None:
        """Go on with new stages that have run what `warm` had to the end, and nothing else.

        What was in flight is lost, and all KV with it: sequences that hold a slot are computed
        again from their tokens, like preempted ones.
        """
        slots = self.slots
        self.in_flight.clear()
        slots.in_flight[:] = 0
        self.pool.forget()
        for sequence in [one for one in slots.sequences if one is not None]:
            if sequence.ended:
                self.vacate(sequence)
            else:
                self._put_back(sequence)
        self.epoch = warm.epoch
        self._next_number = warm._next_number
        self._released = warm._released

    # ---- arrivals and departures

    def submit(self, request: Request, now: float, page_keys: Iterable[bytes] = ()) -> Sequence:
        """Queue a request that passed the door: it fits the context and the pages.

        `page_keys` may stand for the hashes of the prompt's full pages, all but a last one that
        ends with the prompt, if whoever submits knows what prompts have in common.
        """
        sequence = Sequence(request, np.frombuffer(request.prompt, dtype="<i4"), now)
        sequence.hashes.extend(page_keys)
        sequence.order_key = self._arrivals
        self._arrivals += 1
        self.streams[request.stream] = sequence
        self.order.push(sequence)
        self._waiting_tokens += len(sequence.tokens)
        return sequence

    def withdraw(self, sequence: Sequence) -> None:
        """Take back a sequence that was submitted just now, as if it had never come."""
        del self.streams[sequence.request.stream]
        self._forget_prefill(sequence)

    def abort(self, stream: int) -> None:
        """Take a sequence out of the next plan. Unknown and ended streams are no error."""
        sequence = self.streams.get(stream)
        if sequence is not None:
            self.end(sequence, "abort")

    def end(self, sequence: Sequence, reason: str) -> None:
        """The sequence is over. Its slot and pages return once nothing in flight names them."""
        sequence.ended = True
        if reason != "abort":
            slot = sequence.slot
            self.reserve.note_answer(int(self.slots.known[slot]) - sequence.prompt_len)
        del self.streams[sequence.request.stream]
        self.counters.finished[reason] += 1
        self._forget_prefill(sequence)
        if sequence.slot >= 0:
            self.slots.retire(sequence.slot)
            if self.slots.in_flight[sequence.slot] == 0:
                self.vacate(sequence)

    def vacate(self, sequence: Sequence) -> None:
        """Return slot and pages; only when nothing in flight names them."""
        slot = sequence.slot
        self.slots.leave(slot)
        self.pool.release(sequence.pages)
        sequence.pages = []
        self._released.append(slot)

    @property
    def next_number(self) -> int:
        """Of the plan that is chosen next."""
        return self._next_number

    @property
    def num_running(self) -> int:
        return self.slots.num_alive

    @property
    def num_waiting(self) -> int:
        return len(self.streams) - self.num_running

    # ---- the choice

    def choose(self, now: float) -> tuple[MicroBatch, StepPlan] | None:
        """The next micro-batch and its plan, or None if there is nothing to add to the flight.

        Never None while work is queued and nothing is in flight.
        """
        if len(self.in_flight) >= self.depth or not self.streams:
            return None
        needs = self.slots.needs_decode()
        ready, waiting = self._ready(needs)
        if not len(ready) and not waiting and not len(self.order):
            return None
        draft = Draft()
        budget = self.throttle.budget(self._load(len(ready), len(needs)))
        decodes = self._take_decodes(ready, min(budget.decode_rows, self.max_rows), draft)
        prefills, lengths = self._take_prefills(
            budget.prefill_tokens, self.max_rows - len(decodes), draft, now, decodes
        )
        if not len(decodes) and not prefills and waiting:
            # Nothing else to do: the stages may as well hold this plan while they wait.
            needs = self.slots.needs_decode()
            ready = self.slots.ready_to_decode(needs)
            budget = self.throttle.budget(self._load(len(ready), len(needs)))
            decodes = self._take_decodes(ready, min(budget.decode_rows, self.max_rows), draft)
        if not len(decodes) and not prefills:
            if self.in_flight:
                return None
            # Pages ran out for every row that was chosen. Of all running sequences the oldest can
            # always go on: it may take the pages of all others.
            ready = self.slots.ready_to_decode(self.slots.needs_decode())
            most = min(budget.decode_rows, self.max_rows)
            decodes = self._take_decodes(ready, len(ready), draft)[:most]
            if not len(decodes):
                allowance = budget.prefill_tokens + budget.decode_rows
                prefills, lengths = self._take_prefills(
                    allowance, self.max_rows, draft, now, _NOTHING
                )
        return self._commit(decodes, prefills, lengths, draft)

    def _ready(self, needs: Int64s) -> tuple[Int64s, bool]:
        """Of the slots that need decodes, those that may now; whether others should rather wait.

        The first stage holds a whole micro-batch back until the tokens of all its rows are there. A
        token comes back one round, that is as many micro-batches as there are stages, after its row
        was planned; a row planned again sooner would stall the others.
        """
        slots = self.slots
        ready = slots.ready_to_decode(needs)
        if self.stages == 1:
            return ready, False  # whoever was planned before was planned a round ago
        back = slots.planned[ready] < slots.known[ready]
        back |= slots.planned_in[ready] <= self._next_number - self.stages
        may = ready[back]
        return may, len(may) < len(ready)

    def _load(self, ready: int, decoding: int) -> Load:
        reserved = 0
        if self.throttle.keeps_reserve and self._waiting_tokens:
            reserved = self.reserve.needed(*self.reserve.running(self.slots))
        return Load(
            decoding=decoding,
            ready=ready,
            waiting_tokens=self._servable_tokens(),
            pages_available=self.pool.num_available,
            num_pages=self.pool.num_pages,
            groups=self.stages,
            turn=self._turn,
            entered_tokens=self._entered_tokens,
            pages_reserved=reserved,
        )

    def _servable_tokens(self) -> int:
        """Prompt tokens waiting of sequences that have a slot or, on average, would find one."""
        outside = self.num_waiting
        if not outside:
            return self._entered_tokens
        tokens = self._waiting_tokens - self._entered_tokens
        return self._entered_tokens + -(-tokens * min(outside, len(self.slots.free)) // outside)

    def _take_decodes(self, ready: Int64s, count: int, draft: Draft) -> Int64s:
        """The first `count` ready slots that have, or can get, a page for their next token."""
        chosen = ready[:count]
        slots = self.slots
        lacking = slots.planned[chosen] == slots.num_pages[chosen] * self.page_size
        needy = [slots[slot] for slot in chosen[lacking].tolist()]
        if not needy:
            return chosen
        needy.sort(key=lambda sequence: sequence.order_key)
        skipped: set[int] = set()
        pages = self.pool.allocate(len(needy))
        if pages is not None:
            for sequence, page in zip(needy, pages, strict=True):
                self._add_page(sequence, page, draft)
        else:
            for sequence in needy:
                if sequence.slot < 0 or sequence.slot in skipped:
                    continue  # preempted by an older one just now
                found = self._find_page(sequence, skipped)
                if found is None:
                    skipped.add(sequence.slot)
                else:
                    self._add_page(sequence, found, draft)
        if skipped:
            chosen = chosen[~np.isin(chosen, list(skipped))]
        return chosen

    def _add_page(self, sequence: Sequence, page: int, draft: Draft) -> None:
        draft.page_slots.append(sequence.slot)
        draft.page_columns.append(len(sequence.pages))
        draft.page_ids.append(page)
        sequence.pages.append(page)
        self.slots.num_pages[sequence.slot] += 1

    def _find_page(self, sequence: Sequence, skipped: set[int]) -> int | None:
        """A page for a sequence, preempting younger ones that are not in flight if need be."""
        while True:
            pages = self.pool.allocate(1)
            if pages is not None:
                return pages[0]
            victim = self._youngest_at_rest(sequence.order_key)
            if victim is None:
                return None
            skipped.add(victim.slot)
            self._preempt(victim)

    def _youngest_at_rest(self, younger_than: int) -> Sequence | None:
        """The youngest running sequence that no micro-batch in flight names, if young enough."""
        slots = self.slots
        at_rest = np.flatnonzero(slots.alive & (slots.in_flight == 0))
        victim = max(
            (slots[int(slot)] for slot in at_rest),
            key=lambda sequence: sequence.order_key,
            default=None,
        )
        return victim if victim is not None and victim.order_key > younger_than else None

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self.reserve.note_preemption()
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Take all pages away; the sequence is computed again from its tokens later."""
        slot = sequence.slot
        slots = self.slots
        self._forget_prefill(sequence)
        sequence.tokens = slots.tokens[slot, : slots.known[slot]].copy()
        sequence.registered = 0
        self.vacate(sequence)
        self._waiting_tokens += len(sequence.tokens)
        self.order.push(sequence)

    def _forget_prefill(self, sequence: Sequence) -> None:
        """Take a sequence out of the order if its prefill is not planned to its end."""
        slot = sequence.slot
        if slot < 0:
            self._waiting_tokens -= len(sequence.tokens)
            self.order.discard(sequence)
        elif self.slots.planned[slot] < self.slots.target[slot]:
            left = int(self.slots.target[slot] - self.slots.planned[slot])
            self._waiting_tokens -= left
            self._entered_tokens -= left
            self.order.discard(sequence)

    def _take_prefills(
        self, budget: int, rows: int, draft: Draft, now: float, decodes: Int64s
    ) -> tuple[list[int], list[int]]:
        """Prefill chunks in the order of service, admitting sequences as slots and pages allow."""
        taken: list[int] = []
        lengths: list[int] = []
        if budget <= 0:
            return taken, lengths
        slots = self.slots
        keeps_targets = self.order.keeps_targets and len(decodes) > 0
        if keeps_targets:
            new = decodes[np.isinf(slots.decoding_since[decodes])]
            slots.decoding_since[new] = now
        if not len(self.order):
            return taken, lengths
        # When the next in order cannot enter, nobody behind it may, but who is in goes on.
        half_done = slots.half_done()
        entered = len(half_done)
        held = int(slots.num_pages[half_done].sum()) if entered else 0
        clock: StepClock | None = None
        if keeps_targets:
            clock = StepClock(self.outlook.step_seconds, slots, decodes, self.stages, now)
        full = False
        for sequence in self.order.ranked(now):
            if budget <= 0 or len(taken) >= rows or (full and not entered):
                break
            if sequence.slot >= 0:
                entered -= 1
            elif full or not self._may_begin(sequence, held, budget, taken):
                continue
            elif not self._admit(sequence, draft):
                full = True
                continue
            else:
                held += len(sequence.pages)
            slot = sequence.slot
            left = int(slots.target[slot] - slots.planned[slot])
            length = min(budget, left)
            if clock is not None:
                length = clock.fitting(length, int(slots.planned[slot]), left, first=not taken)
                if not length:
                    break
            taken.append(slot)
            lengths.append(length)
            budget -= length
            if length == left:
                held -= len(sequence.pages)
        return taken, lengths

    def _may_begin(self, sequence: Sequence, held: int, budget: int, taken: list[int]) -> bool:
        """Whether a prompt may be begun beside others that are half done and hold so many pages.

        Half-done prompts hold pages for nothing, so together they may have half of all. A prompt
        whose next page is being computed for another one waits for it, as it then has to compute
        less. `taken` slots have a chunk in the micro-batch that is being chosen.
        """
        if self.order.keeps_targets:
            self.outlook.look(sequence)
            if self._is_computed_now(sequence, taken):
                return False
        if not held or self.outlook.left(sequence)[0] <= budget:
            return True
        pages = -(-len(sequence.tokens) // self.page_size)
        return 2 * (held + pages) <= self.pool.num_pages

    def _is_computed_now(self, sequence: Sequence, taken: list[int]) -> bool:
        """Whether another prompt's chunks are computing the page after those that the cache has."""
        if not self.caching:
            return False
        hits = sequence.hit_pages
        if hits >= len(sequence.hashes):
            return False
        slots = self.slots
        at_work = slots.alive & (slots.confirmed < slots.target) & (slots.in_flight > 0)
        for slot in {*np.flatnonzero(at_work).tolist(), *taken}:
            other = slots[slot]
            soon = other.registered <= hits < len(other.hashes)
            if soon and other.hashes[hits] == sequence.hashes[hits]:
                return True
        return False

    def predicted_ttft(self, sequence: Sequence, now: float) -> float:
        """Seconds until a waiting sequence's first token, by the prefills that come before it.

        Nobody else is taken to come, and slots and pages to be free when it is its turn.
        """
        ahead = 0.0
        for other in self.order.ranked(now):
            self.outlook.look(other)
            ahead += self.outlook.seconds(other)
            if other is sequence:
                break
        return ahead

    def _admit(self, sequence: Sequence, draft: Draft) -> bool:
        """Give a slot and the pages of all its known tokens, after the prefix hit; or False."""
        slots, pool, size = self.slots, self.pool, self.page_size
        if not slots.free:
            return False
        tokens = sequence.tokens
        hits: list[int] = []
        if self.caching:
            # At least one token is always computed, as its logits are needed.
            full = (len(tokens) - 1) // size
            salt = sequence.request.cache_salt
            extend_chain(sequence.hashes, tokens, salt, size, full)
            hits = pool.lookup(sequence.hashes[:full], tokens)
        count = -(-len(tokens) // size) - len(hits)
        taken = count + pool.num_unused(hits)
        spare = 0 if slots.num_entered == 0 else 1 + pool.num_pages // 128
        if taken + spare > pool.num_available or not self._all_can_end(sequence, taken, spare):
            return False
        pool.hold(hits)
        fresh = pool.allocate(count)
        if fresh is None:
            raise AssertionError("the pool promised pages that it does not have")
        sequence.pages = hits + fresh
        sequence.registered = len(hits)
        cached = len(hits) * size
        slot = slots.enter(sequence, cached)
        self._waiting_tokens -= cached
        self._entered_tokens += len(tokens) - cached
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = cached
            self.counters.prompt_tokens += len(tokens)
            self.counters.cached_prompt_tokens += cached
            self.admitted.append(Admitted(sequence.request.stream, cached))
        draft.page_slots.extend([slot] * len(sequence.pages))
        draft.page_columns.extend(range(len(sequence.pages)))
        draft.page_ids.extend(sequence.pages)
        draft.admitted.append(
            Admission(
                slot=slot,
                num_tokens=len(tokens),
                computed=cached,
                prompt_len=sequence.prompt_len,
                tokens=tokens.astype("<i4", copy=False).tobytes(),
                params=sequence.request.params,
                choice=sequence.request.choice,
            )
        )
        return True

    def _all_can_end(self, sequence: Sequence, taken: int, spare: int) -> bool:
        """Whether all who run could still end, by what is expected, beside a newcomer that takes
        so many pages now, with `spare` to spare. One that would run alone may always enter.
        """
        slots = self.slots
        if not self.throttle.keeps_reserve or slots.num_entered == 0:
            return True
        held, left = self.reserve.running(slots)
        request, written = sequence.request, len(sequence.tokens) - sequence.prompt_len
        own = self.reserve.expected(
            np.array([written]),
            np.array([request.max_tokens]),
            np.array([request.params.ignore_eos and not request.params.stop_token_ids]),
        )
        held, left = np.append(held, taken), np.append(left, own)
        return taken + spare + self.reserve.needed(held, left) <= self.pool.num_available

    def _commit(
        self, decodes: Int64s, prefills: list[int], lengths: list[int], draft: Draft
    ) -> tuple[MicroBatch, StepPlan] | None:
        """Enter the choice into the arrays and write the plan."""
        if not len(decodes) and not prefills:
            return None
        slots = self.slots
        slots.planned[decodes] += ONE
        slots.in_flight[decodes] += ONE
        slots.planned_in[decodes] = self._next_number
        chunk_slots = chunk_lengths = _NOTHING
        sampled = decodes
        if prefills:
            chunk_slots = np.array(prefills, dtype=np.int64)
            chunk_lengths = np.array(lengths, dtype=np.int64)
            slots.planned[chunk_slots] += chunk_lengths
            slots.in_flight[chunk_slots] += 1
            slots.planned_in[chunk_slots] = self._next_number
            self._waiting_tokens -= sum(lengths)
            self._entered_tokens -= sum(lengths)
            for slot, length in zip(prefills, lengths, strict=True):
                self.order.served(slots[slot], length)
            whole = chunk_slots[slots.planned[chunk_slots] == slots.target[chunk_slots]]
            for slot in whole.tolist():
                self.order.discard(slots[slot])
            slots.decoding[whole] = True
            sampled = np.concatenate((decodes, whole))
        batch = MicroBatch(self._next_number, decodes, chunk_slots, chunk_lengths, sampled)
        self.in_flight.append(batch)
        self._next_number += 1
        self._turn += 1
        self.reserve.note_micro_batch()
        self.order.decoded(decodes)
        self.outlook.note_micro_batch()
        plan = StepPlan(
            number=batch.number,
            epoch=self.epoch,
            decode_slots=decodes.astype("<u2").tobytes(),
            prefill_slots=_packed(prefills, "H"),
            prefill_lens=_packed(lengths, "I"),
            page_slots=_packed(draft.page_slots, "H"),
            page_columns=_packed(draft.page_columns, "I"),
            page_ids=_packed(draft.page_ids, "I"),
            released=_packed(self._released, "H"),
            admitted=draft.admitted,
        )
        self._released.clear()
        return batch, plan
