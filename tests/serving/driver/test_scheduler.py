from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config.engine import ORDERS
from serving.config.service import Service, TtftTarget
from serving.core import SamplingParams
from serving.errors import EngineDeadError
from serving.messages import StepResult
from tests.serving.driver.fake import EOS, FakeEngine, expected_output, next_token

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def prompt_without_eos(steps: int) -> list[int]:
    """A prompt whose output does not reach the end-of-sequence token for so many steps."""
    for start in range(10_000):
        prompt = [start % 50, start // 50, 2]
        output, reason = expected_output(prompt, SamplingParams(max_tokens=steps))
        if reason == "length" and len(output) == steps:
            return prompt
    raise AssertionError


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [3, 16, 512])
def test_outputs_are_those_of_each_sequence_alone(stages: int, budget: int) -> None:
    engine = FakeEngine(pipeline_parallel_size=stages, max_num_batched_tokens=budget)
    source = random.Random(stages * 1000 + budget)
    for _ in range(30):
        prompt = [source.randrange(50) for _ in range(source.randrange(1, 40))]
        engine.submit(prompt, max_tokens=source.randrange(1, 30))
    engine.run_all()
    engine.check_outputs()
    assert len(engine.reasons) == 30
    assert engine.scheduler.pool.num_used == 0


def test_a_length_stop_costs_no_extra_step() -> None:
    prompt = prompt_without_eos(6)
    engine = FakeEngine(pipeline_parallel_size=2)
    engine.submit(prompt, max_tokens=6)
    engine.run_all()
    assert engine.scheduler._next_number == 6  # the prefill samples the first token


def test_an_end_token_is_seen_one_step_late_and_the_extra_token_dropped() -> None:
    prompt = next(
        [a, b]
        for a in range(50)
        for b in range(50)
        if next_token([a, b]) != EOS and next_token([a, b, next_token([a, b])]) == EOS
    )
    engine = FakeEngine()
    stream = engine.submit(prompt, max_tokens=20)
    engine.run_all()
    assert engine.reasons[stream] == "stop"
    assert engine.stop_tokens[stream] == EOS
    assert len(engine.outputs[stream]) == 1
    assert engine.scheduler._next_number == 3


def test_stop_ids_and_min_tokens() -> None:
    prompt = prompt_without_eos(6)
    output, _ = expected_output(prompt, SamplingParams(max_tokens=6))
    engine = FakeEngine()
    stops = engine.submit(prompt, max_tokens=6, stop_token_ids=[output[2]])
    late = engine.submit(
        prompt, max_tokens=6, stop_token_ids=[output[2]], min_tokens=output.index(output[2]) + 1
    )
    engine.run_all()
    engine.check_outputs()
    assert engine.stop_tokens[stops] == output[2]
    assert len(engine.outputs[late]) > len(engine.outputs[stops])


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_plans_run_ahead_but_a_decode_waits_for_at_most_one_unknown_token(stages: int) -> None:
    engine = FakeEngine(pipeline_parallel_size=stages)
    for _ in range(6):
        engine.submit(prompt_without_eos(12), max_tokens=12)
    while engine.scheduler.streams:
        while engine.plan() is not None:
            assert len(engine.plans) <= stages + 1
        slots = engine.scheduler.slots
        assert (slots.in_flight <= 2).all()
        engine.check()
        engine.run_one()


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("sequences", [1, 3, 8, 13, 16])
def test_decodes_are_split_evenly_over_the_groups(stages: int, sequences: int) -> None:
    engine = FakeEngine(pipeline_parallel_size=stages, max_num_seqs=16, num_pages=400)
    for _ in range(sequences):
        engine.submit(prompt_without_eos(60), max_tokens=60)
    sizes = []
    for _ in range(12 * stages):
        plan = engine.plan()
        while plan is not None:
            sizes.append(len(plan.decode_slots) // 2)
            plan = engine.plan()
        engine.run_one()
    steady = sizes[3 * stages : 10 * stages]
    assert max(steady) - min(steady) <= 1
    if sequences >= stages:
        for start in range(len(steady) - stages):
            assert sum(steady[start : start + stages]) == sequences


def starved(policy: str, *, ignore_eos: bool) -> FakeEngine:
    engine = FakeEngine(
        num_pages=30, max_model_len=60, pipeline_parallel_size=2, schedule_policy=policy
    )
    source = random.Random(9)
    for token in range(40):
        prompt = [source.randrange(50) for _ in range(source.randrange(4, 12))]
        engine.submit([*prompt, token], max_tokens=40, ignore_eos=ignore_eos)
    engine.run_all()
    engine.check_outputs()
    return engine


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_throttle_lets_in_only_who_can_end_so_that_hardly_anybody_is_preempted(
    ignore_eos: bool,
) -> None:
    classic = starved("classic", ignore_eos=ignore_eos).scheduler
    throttle = starved("throttle", ignore_eos=ignore_eos).scheduler
    assert classic.counters.preemptions >= 20
    assert throttle.counters.preemptions <= classic.counters.preemptions // 10
    # Nor does it buy that by running one after the other.
    assert throttle._next_number < 2 * classic._next_number


def test_a_decode_waits_a_round_for_its_token_while_there_is_other_work() -> None:
    """Else the first stage would hold back the prompt tokens that share its micro-batch."""
    engine = FakeEngine(pipeline_parallel_size=3, max_num_batched_tokens=8)
    engine.submit(prompt_without_eos(5), max_tokens=5)
    engine.submit(list(range(40)), max_tokens=2)
    decodes = []
    for _ in range(4):
        plan = engine.plan()
        assert plan is not None
        assert plan.prefill_lens
        decodes.append(len(plan.decode_slots) // 2)
    assert decodes == [0, 0, 0, 1]
    engine.run_all()
    engine.check_outputs()


def test_a_lone_decode_is_planned_before_its_token_is_back() -> None:
    engine = FakeEngine(pipeline_parallel_size=3)
    engine.submit(prompt_without_eos(5), max_tokens=5)
    assert engine.plan() is not None
    assert engine.plan() is not None
    assert len(engine.plans) == 2


def test_prompts_that_find_no_slot_set_no_pace() -> None:
    engine = FakeEngine(max_num_seqs=2)
    for _ in range(6):
        engine.submit(PROMPT, max_tokens=4)
    assert engine.scheduler._servable_tokens() == 20
    engine.plan()
    assert engine.scheduler._servable_tokens() == 0
    assert engine.scheduler._waiting_tokens == 40


def test_chunks_of_one_prompt_may_be_in_consecutive_micro_batches() -> None:
    engine = FakeEngine(pipeline_parallel_size=3, max_num_batched_tokens=8)
    engine.submit(list(range(30)), max_tokens=2)
    for _ in range(4):
        assert engine.plan() is not None
    assert [int.from_bytes(plan.prefill_lens, "little") for plan in engine.plans] == [8, 8, 8, 6]
    engine.run_all()
    engine.check_outputs()


def test_starved_pages_preempt_the_youngest_and_nothing_is_lost() -> None:
    engine = FakeEngine(
        num_pages=10, max_model_len=40, pipeline_parallel_size=2, schedule_policy="classic"
    )
    streams = [engine.submit([token, 2, 3, 4, 5], max_tokens=30) for token in range(6)]
    engine.run_all()
    engine.check_outputs()
    assert set(engine.reasons) == set(streams)
    assert engine.scheduler.counters.preemptions > 0
    assert engine.scheduler.pool.num_used == 0


def test_a_prefix_hit_computes_only_the_rest_and_at_least_one_token() -> None:
    engine = FakeEngine()
    engine.submit(PROMPT[:8], max_tokens=1)
    engine.run_all()
    engine.submit(PROMPT[:8], max_tokens=4)
    plan = engine.plan()
    assert plan is not None
    assert plan.admitted[0].computed == 4
    assert int.from_bytes(plan.prefill_lens, "little") == 4
    engine.submit(PROMPT[:8], salt="another course", max_tokens=4)
    other = engine.plan()
    assert other is not None
    assert other.admitted[0].computed == 0
    engine.run_all()
    engine.check_outputs()
    assert engine.scheduler.counters.cached_prompt_tokens == 4


def test_generated_pages_are_found_by_the_next_turn() -> None:
    prompt = prompt_without_eos(12)
    engine = FakeEngine()
    stream = engine.submit(prompt, max_tokens=12)
    engine.run_all()
    engine.submit(prompt + engine.outputs[stream] + [1, 2], max_tokens=2)
    engine.run_all()
    engine.check_outputs()
    # 15 tokens, of which the last was never an input; 3 full pages were written.
    assert engine.scheduler.counters.cached_prompt_tokens == 12


def test_without_prefix_caching_every_page_is_free_afterwards() -> None:
    engine = FakeEngine(enable_prefix_caching=False)
    for _ in range(3):
        engine.submit(PROMPT, max_tokens=4)
    engine.run_all()
    engine.check_outputs()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_an_abort_returns_pages_within_one_round_and_never_in_flight(stages: int) -> None:
    engine = FakeEngine(pipeline_parallel_size=stages)
    stream = engine.submit(prompt_without_eos(60), max_tokens=60)
    for _ in range(5):
        while engine.plan() is not None:
            pass
        engine.run_one()
    while engine.plan() is not None:
        pass
    in_flight = len(engine.plans)
    assert in_flight > 0
    engine.scheduler.abort(stream)
    assert engine.plan() is None
    for _ in range(in_flight):
        assert engine.scheduler.pool.num_used > 0
        engine.run_one()
        engine.check()
    assert engine.scheduler.pool.num_used == 0
    assert engine.scheduler.slots.num_entered == 0


def test_an_abort_in_the_queue_and_of_the_unknown() -> None:
    engine = FakeEngine(max_num_seqs=1)
    first = engine.submit(PROMPT, max_tokens=3)
    second = engine.submit(PROMPT, max_tokens=3)
    engine.plan()
    engine.scheduler.abort(second)
    engine.scheduler.abort(12345)
    engine.run_all()
    assert set(engine.reasons) == {first}
    assert engine.scheduler.counters.finished["abort"] == 1


def test_after_the_death_of_the_stages_everything_is_computed_again_and_told_once() -> None:
    """A prompt in the middle, decodes in flight, an ended sequence in flight, a queue, an abort."""
    engine = FakeEngine(pipeline_parallel_size=2, max_num_seqs=4, max_num_batched_tokens=8)
    ending = engine.submit(prompt_without_eos(3), max_tokens=9)
    engine.submit(prompt_without_eos(20), max_tokens=20)
    while len(engine.outputs[ending]) < 2:
        engine.plan()
        engine.run_one()
    engine.submit(list(range(30)), max_tokens=5)
    waiting = [engine.submit([stream, 2], max_tokens=3) for stream in range(3)]
    while engine.plan() is not None:
        pass
    slots = engine.scheduler.slots
    engine.scheduler.abort(ending)
    assert slots.in_flight[0] > 0  # the ended one still has its slot
    assert slots.sequences[0] is not None
    told = len(engine.scheduler.admitted)
    tokens_known = engine.scheduler.counters.generation_tokens

    engine.lose_stages()
    scheduler = engine.scheduler
    scheduler.pool.check()
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert not scheduler.in_flight
    assert slots.num_entered == scheduler.num_running == 0
    assert scheduler.num_waiting == len(scheduler.order) == 5
    engine.scheduler.abort(waiting[1])
    plan = engine.plan()
    assert plan is not None
    assert plan.number == 3  # a short request was before it
    engine.run_all()
    engine.check_outputs()
    assert len(engine.reasons) == 4
    assert scheduler.counters.preemptions == 0
    assert scheduler.counters.generation_tokens > tokens_known
    again = [one.stream for one in scheduler.admitted[told:]]
    assert set(again) < set(waiting)


def test_a_result_out_of_turn_or_of_another_size_is_fatal() -> None:
    engine = FakeEngine(pipeline_parallel_size=2)
    engine.submit(prompt_without_eos(4), max_tokens=4)
    engine.plan()
    with pytest.raises(EngineDeadError, match="returned micro-batch 1 where 0 was due"):
        engine.completion.finish(StepResult(number=1))
    with pytest.raises(EngineDeadError, match="sampled 2 tokens instead of 1"):
        engine.completion.finish(StepResult(number=0, tokens=bytes(8)))
    with pytest.raises(EngineDeadError, match="where none was due"):
        engine.completion.finish(StepResult(number=1))


def test_steady_decode_plans_are_small() -> None:
    engine = FakeEngine(num_pages=4096, max_num_seqs=256, max_num_batched_tokens=4096)
    for index in range(256):
        engine.submit([index % 50, index // 50, 3], max_tokens=60, ignore_eos=True)
    for _ in range(40):
        while engine.plan() is not None:
            pass
        engine.run_one()
    steady = sorted(engine.plan_sizes[10:])
    assert steady[len(steady) // 2] < 600
    assert steady[-1] < 4000  # 256 sequences that all need a page in one step


WORK = st.lists(
    st.tuples(
        st.integers(1, 24),  # prompt length
        st.integers(1, 24),  # max_tokens
        st.booleans(),  # shares its prompt's start with others
        st.sampled_from(["", "salt"]),
        st.sampled_from(["keep", "keep", "abort"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    work=WORK,
    stages=st.integers(1, 4),
    budget=st.sampled_from([1, 2, 5, 16, 64]),
    num_pages=st.sampled_from([12, 14, 20, 40]),
    max_seqs=st.sampled_from([1, 2, 3, 8]),
    caching=st.booleans(),
    eviction=st.sampled_from(["lru", "fifo"]),
    policy=st.sampled_from(["classic", "throttle", "steady"]),
    max_batched=st.sampled_from([None, 1, 2]),
    order=st.sampled_from(ORDERS),
    deaths=st.sampled_from([0, 0, 1, 5]),
    seed=st.integers(0, 10_000),
)
def test_any_load_in_any_interleaving(
    work: list[tuple[int, int, bool, str, str]],
    stages: int,
    budget: int,
    num_pages: int,
    max_seqs: int,
    caching: bool,
    eviction: Any,
    policy: str,
    max_batched: int | None,
    order: str,
    deaths: int,
    seed: int,
) -> None:
    """Arrivals, aborts, plans, results and deaths of the stages in random order: budgets hold, all
    finish, all is right, and everything is counted and told once.

    Work conservation is `run_all`'s assertion: with nothing in flight and work queued, a plan.
    """
    source = random.Random(seed)
    engine = FakeEngine(
        num_pages=num_pages,
        max_model_len=48,
        pipeline_parallel_size=stages,
        max_num_batched_tokens=budget,
        max_num_seqs=max_seqs,
        enable_prefix_caching=caching,
        cache_eviction=eviction,
        schedule_policy=policy,
        max_num_batched_rows=max_batched,
        prefill_spread=seed % 20 + 1,
        prefill_floor=1 + seed % 7,
        order=order,
        order_window=1 + seed % 5,
        oldest_age=0.5,
        oldest_share=seed % 3 / 2,
        fairness_tokens=1 + seed % 40,
        step_seconds=lambda step: 0.01 * (1 + step.new_tokens) + 0.002 * step.decode_rows,
    )
    now = 0.0
    waiting = list(work)
    to_abort: list[int] = []
    while waiting or engine.scheduler.streams or engine.plans:
        event = source.random()
        if waiting and event < 0.25:
            length, max_tokens, shares, salt, fate = waiting.pop()
            prompt = [(index * 7 + (0 if shares else length)) % 50 for index in range(length)]
            service = Service(
                tenant=source.choice(["", "a", "b"]),
                program=source.choice(["", "run"]),
                priority=source.randrange(3),
                ttft=source.choice([None, TtftTarget(0.05), TtftTarget(0.01, 0.01, 2.0)]),
                tpot=source.choice([None, 0.01, 0.1]),
            )
            stream = engine.submit(
                prompt, salt=salt, service=service, now=now, max_tokens=max_tokens
            )
            if fate == "abort":
                to_abort.append(stream)
        elif to_abort and event < 0.32:
            engine.scheduler.abort(to_abort.pop())
        elif deaths and event < 0.37:
            deaths -= 1
            engine.lose_stages()
        elif event < 0.7:
            now += 0.02
            plan = engine.plan(now)
            if plan is not None:
                lengths = [
                    int.from_bytes(plan.prefill_lens[i : i + 4], "little")
                    for i in range(0, len(plan.prefill_lens), 4)
                ]
                rows = len(plan.decode_slots) // 2 + len(lengths)
                tokens = len(plan.decode_slots) // 2 + sum(lengths)
                assert 0 < rows <= min(max_seqs, max_batched or max_seqs)
                assert tokens <= budget
            elif not engine.plans:
                assert not engine.scheduler.streams, "work is queued and nothing was planned"
        elif engine.plans:
            engine.run_one()
        engine.check()
        slots = engine.scheduler.slots
        assert (slots.in_flight <= stages + 1).all()
    engine.check_outputs()
    aborted = engine.scheduler.counters.finished["abort"]
    assert len(engine.reasons) + aborted == len(work)
    told = [one.stream for one in engine.scheduler.admitted]
    assert len(told) == len(set(told))
    prompts = [len(engine.params[stream][0]) for stream in told]
    assert engine.scheduler.counters.prompt_tokens == sum(prompts)
    given = sum(len(output) for output in engine.outputs.values())
    stops = sum(token is not None for token in engine.stop_tokens.values())
    assert engine.scheduler.counters.generation_tokens == given + stops
    assert engine.scheduler.pool.num_used == 0
    assert engine.scheduler._waiting_tokens == engine.scheduler._entered_tokens == 0
    assert len(engine.scheduler.order) == 0
    if not caching:
        assert engine.scheduler.pool.num_cached == 0
