"""Order for the share of requests that meet their targets.

What decides, first to last:

1. Fairness: prompts of tenants that are too far ahead come behind all others (`fairness.py`).
   Then answers that were interrupted go on.
2. The lane: a share of the prompt tokens goes to the oldest prompt above an age limit, and the
   share grows with its age.
3. Deadlines: as many prompts as possible get their first token in time, by prediction. That set is
   Moore's and Hodgson's (1968): go through the prompts by deadline, and when one would be late,
   leave out the longest so far. Whoever is left out comes behind; those without a target, and those
   that cannot be in time even when served at once, come last.
4. Shortest remaining prefill: of those that will be in time, the shortest goes first that makes no
   other one late, those of spared lengths (`lengths.py`) before others; those behind are served
   shortest first.

All of it is decided again for every micro-batch, since the remaining prefill shrinks with each
chunk and with what the prefix cache takes in. Only the oldest prompts, a window that grows with
the queue, are put in order; behind it they stay by arrival. Newcomers have most time left, so a
window smaller than the queue costs targets: its default only bounds the work of a choice.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.core import Sequence
from serving.driver.order.base import Order
from serving.driver.order.fairness import Deficits
from serving.driver.order.lengths import LengthShares
from serving.driver.outlook import Outlook
from serving.driver.slots import Int64s

#: Rows of a queue's figures: when the age of a prompt begins, when it is due, the predicted seconds
#: of what is left of it, NaN before they are reckoned first, its class of lengths, and 1 once its
#: first token was noted as late.
_SINCE, _DEADLINE, _SECONDS, _CLASS, _LATE = range(5)
#: Prompts whose share of the cache is looked up again for a micro-batch, in turn.
_LOOKS = 8
#: While a prompt is served others come, and some go first: it takes so many times as long as alone.
_CROWD = 1.5
#: A first token comes when its micro-batch ends: so many seconds before its deadline a prompt is to
#: be done.
_ENDING = 0.05
#: Calls of a program age together as long as none of its gaps is longer, in seconds.
_PROGRAM_GAP = 600.0


@dataclass
class _Program:
    since: float
    last: float


class SloOrder(Order):
    """`window` prompts, and half of those beyond, are put in order. The lane has `oldest_share` of
    the prompt tokens while the oldest prompt is older than `oldest_age` seconds. `lead` is how far
    a tenant may be ahead, in weighted tokens.
    """

    keeps_targets = True

    def __init__(
        self,
        outlook: Outlook,
        num_slots: int,
        *,
        window: int,
        oldest_share: float,
        oldest_age: float,
        lead: int,
    ) -> None:
        self._outlook = outlook
        self._window = window
        self._share = oldest_share
        self._age = oldest_age
        self.deficits = Deficits(lead)
        # The queue by arrival: ranks of arrival, prompts, and the figures of each; the columns of
        # `_figures` beyond the queue's length are free.
        self._keys: list[int] = []
        self._queue: list[Sequence] = []
        self._figures = np.zeros((5, 64))
        self._lengths = LengthShares()
        self._now = 0.0
        self._begun: set[int] = set()  # ranks of arrival of those whose answer was interrupted
        self._version = 0  # of the prices in the seconds
        self._credit = 0.0  # prompt tokens that the lane has coming
        self._lane = oldest_share
        self._aged = False  # whether anybody is old enough for the lane
        self._oldest: Sequence | None = None  # whom the lane serves in this micro-batch
        self._turn = 0
        self._programs: dict[tuple[str, str], _Program] = {}
        self._slot_tenant = [""] * num_slots

    # ---- the queue

    def push(self, sequence: Sequence) -> None:
        service = sequence.request.service
        outlook = self._outlook
        outlook.look(sequence)
        deadline = math.inf
        if service.ttft is not None:
            tokens, before = outlook.left(sequence)
            own = outlook.alone(tokens, before)
            deadline = sequence.arrival + service.ttft.of(sequence.prompt_len, own)
        place = bisect_left(self._keys, sequence.order_key)
        self._keys.insert(place, sequence.order_key)
        self._queue.insert(place, sequence)
        count, figures = len(self._queue), self._figures
        if count > figures.shape[1]:
            figures = self._figures = np.concatenate((figures, figures), axis=1)
        figures[:, place + 1 : count] = figures[:, place : count - 1]
        length_class = self._lengths.class_of(sequence.prompt_len)
        figures[:, place] = self._age_begins(sequence), deadline, math.nan, length_class, 0
        self.deficits.enter(service.tenant)
        if len(sequence.tokens) > sequence.prompt_len:
            self._begun.add(sequence.order_key)

    def discard(self, sequence: Sequence) -> None:
        place = bisect_left(self._keys, sequence.order_key)
        if place < len(self._keys) and self._keys[place] == sequence.order_key:
            del self._keys[place], self._queue[place]
            count, figures = len(self._queue), self._figures
            figures[:, place:count] = figures[:, place + 1 : count + 1]
            self.deficits.leave(sequence.request.service.tenant)
            self._begun.discard(sequence.order_key)

    def __len__(self) -> int:
        return len(self._queue)

    def _age_begins(self, sequence: Sequence) -> float:
        """When the age of a sequence begins: with the first call of its program."""
        service = sequence.request.service
        if not service.program:
            return sequence.arrival
        at = sequence.arrival
        programs = self._programs
        if len(programs) >= 4096:
            gone = [key for key, one in programs.items() if at - one.last > _PROGRAM_GAP]
            for key in gone or [next(iter(programs))]:
                del programs[key]
        program = programs.get((service.tenant, service.program))
        if program is None or at - program.last > _PROGRAM_GAP:
            program = programs[service.tenant, service.program] = _Program(at, at)
        program.last = max(program.last, at)
        # Old enough for the lane at once, but a program that never ends is not the oldest for ever.
        return max(program.since, at - self._age)

    # ---- what was served

    def served(self, sequence: Sequence, tokens: int) -> None:
        tenant = sequence.request.service.tenant
        self.deficits.charge(tenant, prompt=tokens)
        self._slot_tenant[sequence.slot] = tenant
        if not self._outlook.left(sequence)[0]:
            place = bisect_left(self._keys, sequence.order_key)
            figures = self._figures[:, place]
            if figures[_DEADLINE] < math.inf and not figures[_LATE]:
                self._lengths.note(int(figures[_CLASS]), bool(self._now <= figures[_DEADLINE]))
        if self._aged:
            self._credit += self._lane * tokens
            if sequence is self._oldest:
                self._credit -= tokens

    def decoded(self, slots: Int64s) -> None:
        if len(self.deficits.served) > 1:
            rows = Counter(self._slot_tenant[slot] for slot in slots.tolist())
            for tenant, count in rows.items():
                self.deficits.charge(tenant, answer=count)

    # ---- the choice

    def ranked(self, now: float) -> Iterator[Sequence]:
        self._now = now
        return iter(list(self._queue)) if len(self._queue) < 2 else self._ranked(now)

    def _ranked(self, now: float) -> Iterator[Sequence]:
        self._refresh()
        queue, figures, places = self._queue, self._figures, np.arange(len(self._queue))
        due = figures[_DEADLINE, : len(queue)]
        for place in ((due < now) & (figures[_LATE, : len(queue)] == 0)).nonzero()[0].tolist():
            figures[_LATE, place] = 1
            self._lengths.note(int(figures[_CLASS, place]), False)
        behind: list[Sequence] = []
        ahead = self.deficits.ahead()
        if ahead:
            waits = np.array([one.request.service.tenant in ahead for one in queue])
            behind = [queue[place] for place in places[waits].tolist()]
            places = places[~waits]
        # Whose answer was interrupted, by a preemption or a death of stages, is not waiting for a
        # first token: that one was in time or not, and every moment counts against its pace.
        if self._begun:
            begun = np.array([queue[place].order_key in self._begun for place in places.tolist()])
            yield from [queue[place] for place in places[begun].tolist()]
            places = places[~begun]
        self._oldest = None
        if not len(places):
            yield from self._by_service(behind)
            return
        oldest = int(places[figures[_SINCE, places].argmin()])
        age = now - float(figures[_SINCE, oldest])
        self._aged = age > self._age
        # The older it is, the larger its share, so that the longest wait stays within bounds.
        self._lane = min(max(self._share, 0.5), self._share * age / max(self._age, 1.0))
        if not self._aged:
            self._credit = 0.0
        elif self._credit > 0:
            self._oldest = queue[oldest]
            yield queue[oldest]
            places = places[places != oldest]
        window = self._window + max(0, len(places) - self._window) // 2
        inside = places[:window]
        deadlines, seconds = figures[_DEADLINE, inside], figures[_SECONDS, inside]
        spared = self._lengths.spared()
        if spared is not None:
            spared = spared[figures[_CLASS, inside].astype(np.int64)]
        for place in in_time_then_shortest(
            now, deadlines, seconds, spared, crowd=_CROWD, ending=_ENDING
        ):
            yield queue[inside[place]]
        for place in places[window:].tolist():
            yield queue[place]
        yield from self._by_service(behind)

    def _by_service(self, waiting: list[Sequence]) -> list[Sequence]:
        """Whose tenants have had least first."""
        served = self.deficits.served
        return sorted(waiting, key=lambda one: served[one.request.service.tenant])

    def _refresh(self) -> None:
        """Reckon again what may have changed: prices, prompts in work, a few hits in turn."""
        outlook, queue, count = self._outlook, self._queue, len(self._queue)
        seconds = self._figures[_SECONDS, :count]
        if self._version != outlook.version:
            self._version = outlook.version
            changed: Iterable[int] = range(count)
        else:
            begun = [bisect_left(self._keys, one.order_key) for one in outlook.begun()]
            changed = [*np.isnan(seconds).nonzero()[0].tolist(), *begun]
        for place in changed:
            seconds[place] = outlook.seconds(queue[place])
        if not outlook.caching:
            return
        for step in range(min(_LOOKS, count)):
            place = (self._turn + step) % count
            outlook.look(queue[place])
            seconds[place] = outlook.seconds(queue[place])
        self._turn += _LOOKS


def in_time_then_shortest(
    now: float,
    deadlines: NDArray[np.float64],
    seconds: NDArray[np.float64],
    spared: NDArray[np.bool_] | None = None,
    *,
    crowd: float = 1.0,
    ending: float = 0.0,
) -> Iterator[int]:
    """Places of prompts in the order of steps 3 and 4 above, each reckoned when asked for.

    `deadlines` and remaining `seconds` by place; places are ranks of arrival and break ties. Each
    prompt is taken `crowd` times as long, and is to be done `ending` seconds before its deadline.
    No other order has more prompts done in time by that when they are done one after the other;
    unless some are `spared`, which are left out only when no other is, or when they would be late
    by that even if they were the first.
    """
    may_be_in_time = (now + seconds <= deadlines) & (deadlines < math.inf)
    deadlines, seconds = deadlines - ending, crowd * seconds
    by_deadline = deadlines.argsort(kind="stable")
    targeted = int(np.count_nonzero(deadlines < math.inf))
    chosen, left_out = _most_in_time(now, deadlines, seconds, by_deadline[:targeted], spared)
    lengths = seconds[chosen]
    spare = deadlines[chosen] - (now + lengths.cumsum())
    while len(chosen):
        # Whoever goes first delays those of earlier deadlines by its own time.
        least = np.minimum.accumulate(spare[:-1])
        may = lengths.copy()
        if spared is not None:
            may[spared[chosen]] -= lengths.sum()
        may[1:][lengths[1:] > least] = math.inf
        shortest = (may == may[may.argmin()]).nonzero()[0]
        pick = int(shortest[chosen[shortest].argmin()])
        yield int(chosen[pick])
        spare[:pick] -= lengths[pick]
        keep = np.arange(len(chosen)) != pick
        chosen, spare, lengths = chosen[keep], spare[keep], lengths[keep]
    rest = np.sort(np.concatenate((left_out, by_deadline[targeted:])))
    for place in rest[np.lexsort((seconds[rest], ~may_be_in_time[rest]))]:
        yield int(place)


def _most_in_time(
    now: float,
    deadlines: NDArray[np.float64],
    seconds: NDArray[np.float64],
    by_deadline: Int64s,
    spared: NDArray[np.bool_] | None,
) -> tuple[Int64s, Int64s]:
    """The most prompts that can all be in time, by deadline, and the others (Moore, Hodgson)."""
    hopeless = now + seconds[by_deadline] > deadlines[by_deadline]
    late = by_deadline[hopeless]
    if len(late):  # nobody before them would help, spared or not
        by_deadline = by_deadline[~hopeless]
    ends = now + seconds[by_deadline].cumsum()
    if not np.count_nonzero(ends > deadlines[by_deadline]):
        return by_deadline, late
    longest: list[tuple[bool, float, int]] = []
    out: set[int] = set()
    at = now
    lengths, dues = seconds[by_deadline].tolist(), deadlines[by_deadline].tolist()
    last = [False] * len(lengths) if spared is None else spared[by_deadline].tolist()
    rows = zip(by_deadline.tolist(), lengths, dues, last, strict=True)
    for place, length, due, is_spared in rows:
        heapq.heappush(longest, (is_spared, -length, -place))
        at += length
        while at > due:
            _, won, number = heapq.heappop(longest)
            at += won
            out.add(-number)
    kept = np.array([place not in out for place in by_deadline.tolist()], dtype=np.bool_)
    return by_deadline[kept], np.concatenate((late, by_deadline[~kept]))
