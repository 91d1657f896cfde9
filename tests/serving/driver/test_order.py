"""Orders of service: what each looks at, and what the order for targets promises."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config.service import Service, TtftTarget
from serving.driver.order.fairness import Deficits
from serving.driver.order.lengths import LengthShares
from serving.driver.order.slo import SloOrder, in_time_then_shortest
from serving.driver.predictor import StepFeatures
from tests.serving.driver.fake import FakeEngine, FakeModel


def seconds(step: StepFeatures) -> float:
    """A machine on which a prompt token takes 10 ms and a decode 1 ms."""
    return 0.01 * step.new_tokens + 0.001 * step.decode_rows


def engine(order: str, **settings: Any) -> FakeEngine:
    usual = {
        "max_num_batched_tokens": 8,
        "num_pages": 200,
        "max_model_len": 400,
        "step_seconds": seconds,
        "enable_prefix_caching": False,
    }
    return FakeEngine(order=order, **(usual | settings))


def first_served(made: FakeEngine, now: float = 0.0) -> list[int]:
    """Streams in the order in which their prompts come to their end."""
    ended: list[int] = []
    slots = made.scheduler.slots
    while made.scheduler.order:
        before = {one.request.stream for one in made.scheduler.streams.values()}
        if made.plan(now) is None:
            made.run_one()
        batch = made.scheduler.in_flight[-1] if made.scheduler.in_flight else None
        if batch is not None:
            fresh = batch.sampled[len(batch.decode_slots) :]
            ended += [s for s in slots.stream[fresh].tolist() if s not in ended and s in before]
        while len(made.plans) > 1:
            made.run_one()
        now += 0.08  # what a full micro-batch takes here
    made.run_all()
    made.check_outputs()
    return ended


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 3 * place) % 50 for place in range(length)]


def test_priority_goes_by_what_the_request_names_and_then_by_arrival() -> None:
    made = engine("priority")
    for priority in (2, 0, 1, 0):
        made.submit(prompt(8), service=Service(priority=priority), max_tokens=1)
    assert first_served(made) == [2, 4, 3, 1]


def test_shortest_first_goes_by_the_whole_length() -> None:
    made = engine("sjf")
    for length in (30, 10, 20):
        made.submit(prompt(length), max_tokens=1)
    assert first_served(made) == [2, 3, 1]


def test_longest_prefix_first_goes_by_what_the_cache_holds() -> None:
    made = engine("lpm", enable_prefix_caching=True)
    made.submit(prompt(40), max_tokens=1)
    made.run_all()
    made.submit(prompt(16, start=1), max_tokens=1)
    made.submit([*prompt(20), 1, 2, 3], max_tokens=1)
    made.submit([*prompt(36), 1, 2, 3], max_tokens=1)
    assert first_served(made) == [4, 3, 2]


def test_a_short_prompt_overtakes_a_long_one_between_its_chunks() -> None:
    made = engine("slo")
    target = Service(ttft=TtftTarget(5.0))
    made.submit(prompt(60), service=target, max_tokens=1)
    made.plan(0.0)
    made.submit(prompt(6), service=target, max_tokens=1)
    assert first_served(made, 0.1) == [2, 1]


def test_what_can_still_be_in_time_goes_before_what_cannot() -> None:
    made = engine("slo")
    made.submit(prompt(60), service=Service(ttft=TtftTarget(0.2)), max_tokens=1)  # takes 0.6 s
    made.submit(prompt(70), service=Service(ttft=TtftTarget(1.5)), max_tokens=1)
    made.submit(prompt(8), max_tokens=1)  # best effort
    assert first_served(made) == [2, 3, 1]


def test_an_answer_that_was_interrupted_goes_on_before_any_newcomer() -> None:
    """Its first token is long out, so its target says nothing about it any more."""
    made = engine("slo")
    target = Service(ttft=TtftTarget(0.5))
    for start in (0, 7):
        made.submit(prompt(8, start), service=target, max_tokens=40)
    for _ in range(12):
        made.plan(0.0)
        made.run_one()
    made.plans.clear()
    made.named.clear()
    made.scheduler.begin(FakeEngine().scheduler)  # the stages died
    made.model = FakeModel(made.config, 200, 400)
    for start in (3, 5):
        made.submit(prompt(6, start), service=target, max_tokens=1, now=9.0)
    assert first_served(made, 9.0) == [1, 2, 3, 4]


def test_nobody_is_made_late_for_a_shorter_one() -> None:
    made = engine("slo")
    made.submit(prompt(60), service=Service(ttft=TtftTarget(1.0)), max_tokens=1)
    made.submit(prompt(30), service=Service(ttft=TtftTarget(5.0)), max_tokens=1)
    assert first_served(made) == [1, 2]


def test_a_first_token_needs_its_micro_batch_to_end() -> None:
    """Reckoned with others that come, 60 tokens take 0.9 s: in time for 0.96 s, not for 0.93."""
    for target, order in ((0.96, [1, 2]), (0.93, [2, 1])):
        made = engine("slo")
        made.submit(prompt(60), service=Service(ttft=TtftTarget(target)), max_tokens=1)
        made.submit(prompt(30), service=Service(ttft=TtftTarget(5.0)), max_tokens=1)
        assert first_served(made) == order


def test_cached_tokens_do_not_count_as_work() -> None:
    made = engine("slo", enable_prefix_caching=True)
    made.submit(prompt(60), max_tokens=1)
    made.run_all()
    made.submit(prompt(24, start=1), max_tokens=1)
    made.submit([*prompt(60), 5, 5], max_tokens=1)
    assert first_served(made) == [3, 2]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    made = engine("slo", enable_prefix_caching=True)
    shared = prompt(40)
    made.submit([*shared, 1], max_tokens=2)
    made.plan(0.0)
    made.submit([*shared, 2], max_tokens=2)
    made.run_all()
    made.check_outputs()
    counters = made.scheduler.counters
    assert counters.cached_prompt_tokens == 40
    assert counters.preemptions == 0


def test_calls_of_a_program_age_together() -> None:
    made = engine("slo", oldest_age=1.0, oldest_share=1.0)
    late = Service(ttft=TtftTarget(0.01))
    made.submit(prompt(40), service=Service(program="run"), now=0.0, max_tokens=1)
    made.run_all()
    made.submit(prompt(80), service=late, now=9.0, max_tokens=1)
    made.submit(prompt(90), service=Service(program="run"), now=9.5, max_tokens=1)
    # The lane serves whoever is oldest: the program's second call, as its first one came at 0.
    made.plan(9.6)
    made.plan(9.6)
    slots = made.scheduler.slots
    named = {int(s) for batch in made.scheduler.in_flight for s in batch.prefill_slots}
    assert {int(slots.stream[slot]) for slot in named} == {2, 3}


def test_a_program_that_never_ends_is_not_the_oldest_for_ever() -> None:
    made = engine("slo", oldest_age=1.0, oldest_share=1.0)
    for at in (0.0, 400.0, 800.0):
        made.submit(prompt(20), service=Service(program="run"), now=at, max_tokens=1)
        made.run_all()
    made.submit(prompt(80), now=810.0, max_tokens=1)
    made.submit(prompt(90), service=Service(program="run"), now=820.0, max_tokens=1)
    made.plan(821.0)
    made.plan(821.1)
    slots = made.scheduler.slots
    named = {int(s) for batch in made.scheduler.in_flight for s in batch.prefill_slots}
    assert {int(slots.stream[slot]) for slot in named} == {4}


def test_prompts_of_one_micro_batch_wait_for_a_common_beginning_too() -> None:
    made = engine("slo", enable_prefix_caching=True, max_num_batched_tokens=128)
    for last in (1, 2, 3):
        made.submit([*prompt(40), last], max_tokens=2)
    made.run_all()
    made.check_outputs()
    assert made.scheduler.counters.cached_prompt_tokens == 80


# ---- promises


TIMES = st.lists(
    st.tuples(st.integers(1, 60), st.one_of(st.integers(0, 200), st.just(math.inf))),
    min_size=1,
    max_size=7,
)


def in_time(order: list[int], lengths: list[float], deadlines: list[float]) -> int:
    ends = itertools.accumulate(lengths[place] for place in order)
    return sum(end <= deadlines[place] for place, end in zip(order, ends, strict=True)
               if deadlines[place] < math.inf)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TIMES)
def test_no_other_order_meets_more_targets(times: list[tuple[int, float]]) -> None:
    lengths = [float(length) for length, _ in times]
    deadlines = [float(deadline) for _, deadline in times]
    order = list(in_time_then_shortest(0.0, np.array(deadlines), np.array(lengths)))
    assert sorted(order) == list(range(len(times)))
    met = in_time(order, lengths, deadlines)
    if len(times) <= 5:
        best = max(
            in_time(list(other), lengths, deadlines)
            for other in itertools.permutations(range(len(times)))
        )
        assert met == best
    for place in range(len(order) - 1):
        swapped = order.copy()
        swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
        assert in_time(swapped, lengths, deadlines) <= met


@settings(max_examples=200, deadline=None)
@given(TIMES, st.data())
def test_who_is_spared_is_left_out_only_for_others_who_are(
    times: list[tuple[int, float]], data: st.DataObject
) -> None:
    lengths = np.array([float(length) for length, _ in times])
    deadlines = np.array([float(deadline) for _, deadline in times])
    spared = np.array(data.draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times))))
    order = list(in_time_then_shortest(0.0, deadlines, lengths, spared))
    assert sorted(order) == list(range(len(times)))
    theirs = np.flatnonzero(spared)
    alone = in_time_then_shortest(0.0, deadlines[theirs], lengths[theirs])
    best = in_time(list(alone), lengths[theirs].tolist(), deadlines[theirs].tolist())
    ends = dict(zip(order, itertools.accumulate(lengths[order].tolist()), strict=True))
    met = sum(ends[n] <= deadlines[n] for n in theirs.tolist() if deadlines[n] < math.inf)
    assert met == best


def test_the_spared_go_first_and_the_hopeless_last() -> None:
    lengths = np.array([1.0, 3.0, 2.0, 4.0, 5.0, 9.0])
    deadlines = np.array([12.0, 12.0, 0.5, 12.0, math.inf, 10.0])
    spared = np.array([False, True, False, False, False, False])
    assert list(in_time_then_shortest(0.0, deadlines, lengths)) == [0, 1, 3, 5, 2, 4]
    assert list(in_time_then_shortest(0.0, deadlines, lengths, spared)) == [1, 0, 3, 5, 2, 4]


def test_time_is_kept_for_others_and_for_the_end_of_a_micro_batch() -> None:
    """The longest is in time only when everything goes as quickly as alone."""
    lengths, deadlines = np.array([1.0, 2.0, 1.5]), np.array([3.0, 3.0, 100.0])
    assert list(in_time_then_shortest(0.0, deadlines, lengths)) == [0, 1, 2]
    assert list(in_time_then_shortest(0.0, deadlines, lengths, crowd=1.1)) == [0, 2, 1]
    assert list(in_time_then_shortest(0.0, deadlines, lengths, ending=0.1)) == [0, 2, 1]


def test_a_class_of_lengths_is_spared_while_there_is_enough_to_spare() -> None:
    shares = LengthShares()
    assert shares.spared() is None
    for _ in range(12):
        shares.note(shares.class_of(8192), False)
    spared = shares.spared()
    assert spared is not None
    assert spared.tolist() == [False, False, True]
    assert [shares.class_of(n) for n in (1, 1023, 1024, 8191, 8192)] == [0, 0, 1, 1, 2]
    for _ in range(100):
        shares.note(0, False)
    assert shares.spared() is None  # too few of all are in time
    for _ in range(2000):
        shares.note(2, True)
        shares.note(0, True)
    assert shares.spared() is None


def test_long_prompts_get_their_share_when_not_everybody_can_be_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the most in time the long one would be left out, unless others like it were before."""
    monkeypatch.setattr("serving.driver.order.lengths.BOUNDS", (20, 40))

    def served(late_before: int) -> list[int]:
        made = engine("slo", num_pages=400)
        target = Service(ttft=TtftTarget(1.0))
        for number in range(late_before):
            made.submit(prompt(50, number), service=target, max_tokens=1, now=-10.0)
            made.submit(prompt(2, number), service=Service(ttft=TtftTarget(90.0)), max_tokens=1)
        done = first_served(made)
        made.submit(prompt(60), service=target, max_tokens=1, now=50.0)
        for start in (1, 2, 3):
            made.submit(prompt(30, start), service=target, max_tokens=1, now=50.0)
        last = 2 * late_before
        return [stream - last for stream in first_served(made, 50.0) if stream not in done]

    assert served(0)[:2] == [2, 3]
    assert served(16)[0] == 1


@settings(max_examples=100, deadline=None)
@given(TIMES, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_places(
    times: list[tuple[int, float]], source: random.Random
) -> None:
    """Whoever stands where: the same lengths and deadlines are served alike."""
    shuffled = times.copy()
    source.shuffle(shuffled)

    def served(these: list[tuple[int, float]]) -> list[tuple[int, float]]:
        lengths = np.array([float(length) for length, _ in these])
        deadlines = np.array([float(deadline) for _, deadline in these])
        return [these[place] for place in in_time_then_shortest(0.0, deadlines, lengths)]

    if len(set(times)) == len(times) and len({length for length, _ in times}) == len(times):
        assert served(times) == served(shuffled)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    long=st.integers(40, 300),
    short=st.integers(1, 16),
    share=st.sampled_from([0.1, 0.25, 0.5]),
    age=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_nobody_starves(long: int, short: int, share: float, age: float) -> None:
    """A long prompt without a target, and short ones with targets that never stop coming.

    Once it is older than `age`, the lane gives it `share` of all prompt tokens that are served, up
    to one micro-batch that it may be in arrears. Before it is let in those in all slots may end.
    """
    budget, num_slots = 8, 4
    made = engine("slo", oldest_share=share, oldest_age=age, max_num_seqs=num_slots)
    target = made.submit(prompt(long), max_tokens=1)
    now, served = 0.0, 0
    while target in made.scheduler.streams:
        while made.scheduler.num_waiting < 3:
            ttft = TtftTarget(10.0)
            made.submit(prompt(short), service=Service(ttft=ttft), now=now, max_tokens=1)
        plan = made.plan(now)
        if plan is not None and now > age:
            served += int(made.scheduler.in_flight[-1].prefill_lens.sum())
        while len(made.plans) > (plan is not None):
            made.run_one()
        now += 0.08  # what a full micro-batch takes here
        assert served <= (long + 2 * budget) / share + 2 * budget + num_slots * short
    made.run_all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.sampled_from([8, 40, 200]),
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    answers=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_service_is_shared_out_between_tenants(
    lead: int, lengths: tuple[int, int], answers: tuple[int, int]
) -> None:
    """Two tenants that always have prompts waiting stay within `lead` and what one of them has in
    work: one may be in front by a micro-batch when it is stopped, and its answers still run.
    """
    made = engine("slo", fairness_tokens=lead, max_num_seqs=4, oldest_share=0.0)
    names = ("light", "heavy")
    order = made.scheduler.order
    assert isinstance(order, SloOrder)
    deficits = order.deficits
    most = lead + 2 * 8 + 2 * 4 * max(answers) + max(lengths)
    for _ in range(400):
        for name, length, answer in zip(names, lengths, answers, strict=True):
            waiting = sum(
                one.slot < 0 and one.request.service.tenant == name
                for one in made.scheduler.streams.values()
            )
            for _ in range(3 - waiting):
                made.submit(
                    prompt(length), service=Service(tenant=name), max_tokens=answer, ignore_eos=True
                )
        if made.plan() is None:
            made.run_one()
        gap = abs(deficits.served["light"] - deficits.served["heavy"])
        assert gap <= most, (gap, most)
    made.run_all()


def test_a_tenant_that_was_away_has_nothing_saved_up() -> None:
    deficits = Deficits(100)
    deficits.enter("busy")
    deficits.charge("busy", prompt=5000)
    deficits.enter("back")
    assert deficits.served["back"] == 5000
    deficits.charge("busy", prompt=200)
    assert deficits.ahead() == {"busy"}
    deficits.leave("back")
    assert deficits.ahead() == set()


def test_counters_of_tenants_that_are_gone_are_forgotten() -> None:
    deficits = Deficits(100)
    deficits.enter("stays")
    for number in range(10_000):
        deficits.enter(f"key-{number}")
        assert "stays" not in deficits.ahead()
        deficits.charge(f"key-{number}", prompt=number)
        deficits.leave(f"key-{number}")
    assert len(deficits.served) < 5000


def test_who_worked_alone_is_not_behind_a_newcomer() -> None:
    deficits = Deficits(100)
    deficits.enter("old")
    deficits.charge("old", prompt=10_000_000)
    deficits.leave("old")
    deficits.enter("new")
    deficits.enter("old")
    assert deficits.ahead() == set()
    deficits.charge("old", answer=60)
    assert deficits.ahead() == {"old"}


# ---- decodes beside prompts


@pytest.mark.parametrize("tpot", [None, 0.02])
def test_prompts_leave_decodes_their_pace(tpot: float | None) -> None:
    def seconds(step: StepFeatures) -> float:
        return 1e-4 * step.new_tokens + 1e-3 * step.decode_rows

    made = engine(
        "slo",
        max_num_batched_tokens=512,
        max_model_len=6000,
        num_pages=2000,
        step_seconds=seconds,
    )
    made.submit([1, 2], service=Service(tpot=tpot), max_tokens=20, ignore_eos=True)
    made.submit(prompt(5000), max_tokens=1)
    now, seen = 0.0, []
    while made.scheduler.streams:
        made.plan(now)
        while made.plans:
            batch = made.scheduler.in_flight[0]
            if len(batch.decode_slots) and len(batch.prefill_lens):
                seen.append(int(batch.prefill_lens.sum()))
            now += 1e-4 * int(batch.prefill_lens.sum()) + 1e-3 * len(batch.decode_slots)
            made.run_one()
    assert len(seen) > 5
    # 0.02 s hold 190 tokens; what earlier tokens saved may be spent, and is not given twice.
    assert max(seen) > 500 if tpot is None else np.mean(seen) <= 190


def test_a_prediction_of_the_first_token_counts_who_is_ahead() -> None:
    made = engine("fcfs")
    made.submit(prompt(100), max_tokens=1)
    made.submit(prompt(50), max_tokens=1)
    scheduler = made.scheduler
    second = scheduler.streams[2]
    assert scheduler.predicted_ttft(second, 0.0) == pytest.approx(1.5, rel=0.1)
    scheduler.withdraw(second)
    assert len(scheduler.order) == 1
    assert scheduler.num_waiting == 1
    made.run_all()
    made.scheduler.pool.check()
