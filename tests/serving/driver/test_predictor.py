"""The predictor alone: on made-up times whose law is known, and from file to file."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core import Layout, MicroBatch
from serving.driver import kept_times
from serving.driver.predictor import (
    NUM_HEAD,
    NUM_LAYER,
    StagePredictor,
    StepFeatures,
    non_negative_solution,
    padded,
)
from serving.driver.timings import StepTimings
from serving.messages import StepTime
from tests.serving.driver.fake import FakeEngine

LAYERS = 9


def law(step: StepFeatures, *, head: bool = True, slow: float = 1.0) -> float:
    """Reading weights until 128 tokens, then products; keys; a head that is read once."""
    tokens = padded(step.new_tokens + step.decode_rows)
    layer = 120e-6 + 1e-6 * max(0, tokens - 128)
    layer += 1e-9 * step.decode_context + 6e-11 * step.prefill_context
    top = (300e-6 + 2e-6 * step.sampled) if head and step.sampled else 0.0
    return slow * (LAYERS * layer + top)


def some_step(source: random.Random) -> StepFeatures:
    rows = source.choice([0, 1, 4, 20, 60, 150])
    new = source.choice([0, 0, 16, 100, 400, 1000, 2000])
    if not rows and not new:
        rows = 1
    return StepFeatures(
        new_tokens=new,
        prefill_context=new * source.uniform(1, 3000),
        decode_rows=rows,
        decode_context=int(rows * source.uniform(50, 2000)),
        sampled=rows + (source.random() < 0.5 if new else 0),
    )


def taught(count: int, seed: int = 0, noise: float = 0.0, *, head: bool = True) -> StagePredictor:
    source = random.Random(seed)
    predictor = StagePredictor(LAYERS, has_head=head)
    for _ in range(count):
        step = some_step(source)
        predictor.observe(step, law(step, head=head) * source.uniform(1 - noise, 1 + noise))
    return predictor


@pytest.mark.parametrize("head", [0.0, 0.8, 3.2])
def test_the_head_is_told_from_the_layers_where_all_steps_are_decodes(head: float) -> None:
    """All rows are drawn from, so only another stage's layers say what a layer costs."""
    source = random.Random(5)
    inner, last = StagePredictor(9, has_head=False), StagePredictor(9, has_head=True)
    last.like = inner
    for _ in range(1500):
        rows = source.randrange(50, 60)
        step = StepFeatures(0, 0.0, rows, rows * source.randrange(200, 400), rows)
        layer = 1e-4 + 1e-10 * step.decode_context
        inner.observe(step, 9 * layer * source.uniform(0.98, 1.02))
        last.observe(step, (9 * layer + head * 1e-4) * source.uniform(0.98, 1.02))
    assert last.layer_seconds(step) == pytest.approx(layer, rel=0.05)
    assert last.head_seconds(step) == pytest.approx(head * 1e-4, rel=0.1, abs=0.5e-4)


def mean_error(predictor: StagePredictor, slow: float = 1.0, *, head: bool = True) -> float:
    source = random.Random(99)
    errors = []
    for _ in range(300):
        step = some_step(source)
        true = law(step, head=head, slow=slow)
        errors.append(abs(predictor.predict(step) - true) / true)
    return float(np.mean(errors))


def test_a_law_is_learnt_within_a_few_hundred_steps() -> None:
    predictor = taught(600)
    assert mean_error(predictor) < 0.01
    assert predictor.error is not None
    assert predictor.error < 0.05


def test_noise_is_averaged_out_and_its_size_is_the_error_that_is_reported() -> None:
    predictor = taught(3000, noise=0.1)
    assert mean_error(predictor) < 0.02
    assert predictor.error is not None
    assert 0.03 < predictor.error < 0.08  # uniform within 10 %: 5 % on average


def test_layers_and_head_are_told_apart_so_that_layouts_can_be_compared() -> None:
    predictor = taught(2000)
    step = StepFeatures(0, 0.0, 60, 60_000, 60)
    assert predictor.head_seconds(step) == pytest.approx(420e-6, rel=0.1)
    assert predictor.layer_seconds(step) == pytest.approx(180e-6, rel=0.05)
    middle = taught(2000, head=False)
    assert middle.head_seconds(step) == 0
    assert mean_error(middle, head=False) < 0.01


def test_a_stage_that_became_slower_is_followed_within_a_few_hundred_steps() -> None:
    predictor = taught(2000)
    source = random.Random(5)
    for _ in range(1500):
        step = some_step(source)
        predictor.observe(step, law(step, slow=1.3))
    assert mean_error(predictor, slow=1.3) < 0.03


def test_a_hiccup_moves_little() -> None:
    predictor = taught(2000)
    step = StepFeatures(0, 0.0, 20, 10_000, 20)
    before = predictor.predict(step)
    predictor.observe(step, 60.0)
    for _ in range(40):
        predictor.observe(step, law(step))
    assert predictor.predict(step) == pytest.approx(before, rel=0.15)


def test_what_is_not_seen_any_more_is_not_forgotten() -> None:
    predictor = taught(2000)
    long = StepFeatures(2000, 3e6, 0, 0, 1)
    for _ in range(5000):
        predictor.observe(StepFeatures(0, 0.0, 20, 10_000, 20), 0.0015)
    assert predictor.predict(long) == pytest.approx(law(long), rel=0.25)


def test_nothing_is_predicted_from_nothing_and_nonsense_is_not_counted() -> None:
    predictor = StagePredictor(LAYERS, has_head=False)
    assert predictor.predict(StepFeatures(10, 55.0, 0, 0, 1)) == 0
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        predictor.observe(StepFeatures(10, 55.0, 0, 0, 1), seconds)
    assert predictor.seen == 0
    predictor.observe(StepFeatures(10, 55.0, 0, 0, 1), 0.01)
    assert predictor.predict(StepFeatures(10, 55.0, 0, 0, 1)) == pytest.approx(0.01, rel=0.01)


STEPS = st.builds(
    StepFeatures,
    new_tokens=st.integers(0, 9000),
    prefill_context=st.floats(0, 1e9),
    decode_rows=st.integers(0, 2000),
    decode_context=st.integers(0, 10_000_000),
    sampled=st.integers(0, 2000),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(STEPS, st.floats(1e-5, 10)), min_size=1, max_size=80), STEPS, st.booleans()
)
def test_whatever_is_seen_predictions_are_finite_and_within_bounds(
    seen: list[tuple[StepFeatures, float]], asked: StepFeatures, head: bool
) -> None:
    predictor = StagePredictor(LAYERS, has_head=head)
    for step, seconds in seen:
        predictor.observe(step, seconds)
    times = [seconds for _, seconds in seen]
    assert (predictor.coefficients >= 0).all()
    assert 0 <= predictor.predict(asked) <= 16 * max(times)
    assert predictor.layer_seconds(asked) >= 0
    assert predictor.head_seconds(asked) >= 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_the_solution_meets_the_conditions_of_a_least_square(size: int, seed: int) -> None:
    """x >= 0, no slope where x > 0, and none that pays where x = 0."""
    source = np.random.default_rng(seed)
    rows = source.normal(size=(size + 3, size))
    matrix = rows.T @ rows + 1e-6 * np.eye(size)
    target = source.normal(size=size)
    found = non_negative_solution(matrix, target)
    slope = target - matrix @ found
    assert (found >= 0).all()
    assert (slope <= 1e-6).all()
    assert (np.abs(slope[found > 0]) <= 1e-6).all()


def test_steps_are_padded_as_recorded_ones_are() -> None:
    assert [padded(n) for n in (1, 3, 5, 60, 65, 250, 257, 512, 513)] == [
        1, 4, 8, 64, 80, 256, 320, 512, 513,
    ]  # fmt: skip


def timings(stages: int = 2) -> StepTimings:
    return StepTimings(Layout.even(LAYERS * stages, stages))


def batch(number: int, slots: list[int]) -> MicroBatch:
    nothing = np.zeros(0, dtype=np.int64)
    rows = np.array(slots, dtype=np.int64)
    return MicroBatch(number, rows, nothing, nothing, rows)


def test_features_are_those_of_the_micro_batch() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit([1, 2, 3, 4, 5], max_tokens=4, ignore_eos=True)
    engine.plan()
    engine.submit(list(range(20)), max_tokens=4)
    engine.plan()
    first, second = engine.scheduler.in_flight
    assert StepFeatures.of(second, engine.scheduler.slots) == StepFeatures(
        new_tokens=7, prefill_context=1.0 + 2 + 3 + 4 + 5 + 6 + 7, decode_rows=1,
        decode_context=6, sampled=1,
    )  # fmt: skip
    assert first.num_tokens == 5


def times(numbers: Iterable[int], busy: float) -> list[StepTime]:
    return [StepTime(number, busy, 0.0, 0.0) for number in numbers]


def test_times_of_stages_meet_their_micro_batches() -> None:
    slots = FakeEngine().scheduler.slots
    two = timings()
    for number in range(40):
        two.sent(batch(number, [0]), slots)
    two.took(0, times(range(40), 0.01))
    assert [predictor.seen for predictor in two.predictors] == [40, 0]
    assert two.errors[1] is None
    two.took(1, times(range(30), 0.02))
    two.took(1, times([999, 5], 0.02))  # never sent; told twice
    assert [predictor.seen for predictor in two.predictors] == [40, 30]
    assert two.errors[0] == pytest.approx(0, abs=0.02)


def test_numbers_that_come_again_do_not_meet_what_was_sent_before() -> None:
    slots = FakeEngine().scheduler.slots
    one = timings(1)
    one.sent(batch(5, [0]), slots)
    one.forget_sent()
    one.took(0, [StepTime(5, 0.01, 0.0, 0.0)])
    assert one.predictors[0].seen == 0


def test_a_late_report_is_learnt_with_the_layers_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = FakeEngine().scheduler.slots
    one = StepTimings(Layout.of_counts([4, 4]))
    seen: list[int | None] = []

    def observe(step: StepFeatures, seconds: float, layers: int | None = None) -> None:
        seen.append(layers)

    monkeypatch.setattr(one.predictors[0], "observe", observe)
    for number in (7, 8, 9):
        one.sent(batch(number, [0]), slots)
    one.relayout(9, Layout(1, [0, 6, 8]))
    assert one.predictors[0].layers == 6
    one.took(0, times([7, 8, 9], 0.01))
    assert seen == [4, 4, 6]
    one.forget_sent()  # new stages begin with the last layout, and with new numbers
    one.sent(batch(3, [0]), slots)
    one.took(0, times([3], 0.01))
    assert seen[-1] == 6


def test_stages_that_report_nothing_take_no_memory() -> None:
    slots = FakeEngine().scheduler.slots
    one = timings(1)
    for number in range(5000):
        one.sent(batch(number, [0]), slots)
    assert len(one._pending) <= 4096
    one.took(0, times([0, 4999], 0.1))
    assert one.predictors[0].seen == 1


def test_of_a_long_report_the_newest_steps_are_learnt() -> None:
    slots = FakeEngine().scheduler.slots
    one = timings(1)
    for number in range(300):
        one.sent(batch(number, [0]), slots)
    one.took(0, [*times(range(200), 0.5), *times(range(200, 300), 0.01)])
    assert one.predictors[0].seen == 64
    assert one.slowest(StepFeatures(0, 0.0, 1, 1, 1)) == pytest.approx(0.01, rel=0.05)
    assert not one._pending


def test_the_stages_own_times_are_preferred_once_all_are_known() -> None:
    slots = FakeEngine().scheduler.slots
    two = timings()
    step = StepFeatures(0, 0.0, 1, 1, 1)
    for number in range(80):
        done = batch(number, [0])
        done.sent_at = 0.03 * number - 0.01
        two.sent(done, slots)
        two.returned(done, 0.03 * (number + 1))
    assert two.slowest(step) == pytest.approx(0.03, rel=0.1)
    two.took(0, times(range(64), 0.01))
    assert two.slowest(step) == pytest.approx(0.03, rel=0.1)
    two.took(1, times(range(64), 0.02))
    assert two.slowest(step) == pytest.approx(0.02, rel=0.1)


def test_steps_are_padded_as_those_recorded_on_a_gpu() -> None:
    graphs = pytest.importorskip("serving.stage.gpu.graphs")
    for tokens in range(1, 700):
        assert padded(tokens) == (graphs.bucket_of(tokens) or tokens)


def teach(timing: StepTimings, count: int) -> None:
    source = random.Random(1)
    for predictor in timing.predictors:
        for _ in range(count):
            step = some_step(source)
            predictor.observe(step, law(step, head=predictor.has_head))


def test_what_was_learnt_is_there_in_the_next_run(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECTERN_HOME", str(tmp_path))
    devices = ["a chip", "a chip"]
    first = timings()
    assert not first.load("m/7b", devices, "bfloat16")
    first.save("m/7b", devices, "bfloat16")
    assert not kept_times.folder().exists()  # nothing learnt is not worth a file
    teach(first, 1200)
    first.save("m/7b", devices, "bfloat16")
    assert len(list(kept_times.folder().iterdir())) == 1

    second = timings()
    assert second.load("m/7b", devices, "bfloat16")
    assert mean_error(second.predictors[1]) < 0.03
    assert mean_error(second.predictors[0], head=False) < 0.03
    step = StepFeatures(0, 0.0, 20, 10_000, 20)
    second.predictors[1].observe(step, law(step))
    assert second.errors[1] is not None  # from its first step on
    for other in (("m/8b", devices, "bfloat16"), ("m/7b", devices, "float16")):
        assert not timings().load(*other)
    assert not timings().load("m/7b", ["b chip", "b chip"], "bfloat16")


def test_a_device_without_the_head_keeps_what_it_knew_of_one(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECTERN_HOME", str(tmp_path))
    alone = timings(1)
    teach(alone, 1000)
    alone.save("m", ["a"], "t")
    two = timings()
    teach(two, 1000)
    two.save("m", ["a", "b"], "t")
    again = timings(1)
    assert again.load("m", ["a"], "t")
    step = StepFeatures(0, 0.0, 200, 100_000, 200)
    (predictor,) = again.predictors
    assert predictor.head_seconds(step) == alone.predictors[0].head_seconds(step) > 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"version":1,"model":"m","device":"d","dtype":"t","layers":4,"layer":LAYER,"head":[0,0,0]}',
        '{"version":2,"model":"m","device":"d","dtype":"t","layers":4,"layer":[1],"head":[1]}',
        '{"version":2,"model":"m","device":"d","dtype":"t","layers":4,"layer":LAYER,"head":[0,0,-1]}',
    ],
)
def test_a_file_that_says_nothing_is_as_none(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("LECTERN_HOME", str(tmp_path))
    one = timings(1)
    teach(one, 1000)
    one.save("m", ["d"], "t")
    (path,) = kept_times.folder().iterdir()
    path.write_text(content.replace("LAYER", str([0.0] * NUM_LAYER)))
    assert not timings(1).load("m", ["d"], "t")
    one.save("m", ["d"], "t")
    assert timings(1).load("m", ["d"], "t")
    assert NUM_HEAD == 3


def test_a_disk_that_cannot_be_written_costs_only_what_was_learnt(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECTERN_HOME", "/dev/null/nowhere")
    one = timings(1)
    teach(one, 1000)
    one.save("m", ["d"], "t")
    monkeypatch.delenv("LECTERN_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(kept_times.folder()) == f"{tmp_path}/lectern/step-times"
