"""The pipeline in virtual time: what can be worked out by hand, and what policies must do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from serving.driver import kept_times
from serving.driver.predictor import NUM_LAYER, StagePredictor, StepFeatures
from serving.errors import ConfigError
from serving.simulation.pipeline import Arrival, Outcome, Pipeline, Step, simulated_config
from serving.simulation.profile import Profile, interpolate
from serving.simulation.report import summarise
from serving.simulation.traces import read_trace


def flat(**changes: float) -> Profile:
    """Every layer takes 1 ms a micro-batch, whatever is in it."""
    settings: dict[str, object] = {
        "name": "flat",
        "source": "made up",
        "layers": 4,
        "layer_s": [(1, 0.001), (10_000, 0.001)],
        "decode_key_s": 0.0,
        "prefill_pair_s": 0.0,
        "head_s": [(1, 0.0), (10_000, 0.0)],
    }
    return Profile(**(settings | changes))  # type: ignore[arg-type]


def request(at: float, tokens_in: int, tokens_out: int) -> Arrival:
    return Arrival(at, np.arange(tokens_in, dtype=np.int32) + 5, tokens_out)


def simulate(
    arrivals: list[Arrival],
    stages: int,
    profile: Profile | None = None,
    steps: list[Step] | None = None,
    known_lengths: bool = True,
    pages: int = 1000,
    **settings: object,
) -> Outcome:
    defaults: dict[str, object] = {"max_num_seqs": 64, "enable_prefix_caching": False}
    pipeline = Pipeline(
        profile or flat(),
        simulated_config(stages, **(defaults | settings)),
        num_pages=pages,
        max_model_len=4096,
        known_lengths=known_lengths,
        longest_answer=200,
        on_step=None if steps is None else steps.append,
    )
    return pipeline.run(arrivals)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_one_request_passes_all_layers_once_a_token(stages: int) -> None:
    outcome = simulate([request(1.0, 10, 5)], stages)
    assert outcome.first == pytest.approx([0.004])
    assert outcome.last == pytest.approx([0.020])
    assert outcome.steps == 5
    assert sum(stage.busy for stage in outcome.stages) == pytest.approx(0.020)


def test_links_and_the_way_back_cost_what_the_profile_says() -> None:
    profile = flat(link_s=0.01, link_token_s=0.001, token_return_s=0.1, news_s=1.0, plan_s=0.05)
    steps: list[Step] = []
    outcome = simulate([request(0.0, 10, 3)], 2, profile, steps)
    first, second, _ = steps
    assert first.began == pytest.approx([1.05, 1.05 + 0.002 + 0.01 + 10 * 0.001])
    assert outcome.first[0] == pytest.approx(first.ended[1] + 1.0)
    # Its plan was there long before, so only the token was waited for.
    assert second.began[0] == pytest.approx(first.ended[1] + 0.1)


def test_stages_work_at_the_same_time_and_groups_fill_the_pipeline() -> None:
    arrivals = [request(0.0, 4, 50) for _ in range(8)]
    outcome = simulate(arrivals, 4, max_num_batched_tokens=64)
    # Four groups of two: one token each per round of four micro-batches of 1 ms.
    assert outcome.wall == pytest.approx(50 * 0.004, rel=0.1)
    busy = [stage.busy / (stage.busy + stage.wait_input) for stage in outcome.stages]
    assert min(busy) > 0.9


def test_a_run_is_the_same_every_time() -> None:
    arrivals = [request(0.001 * n, 10 + n, 5 + n % 7) for n in range(40)]
    one = simulate(arrivals, 3, schedule_policy="throttle")
    two = simulate(arrivals, 3, schedule_policy="throttle")
    assert (one.first == two.first).all()
    assert (one.last == two.last).all()


def test_answers_stop_by_themselves_when_lengths_are_unknown() -> None:
    outcome = simulate([request(0.0, 10, 5), request(0.0, 10, 50)], 2, known_lengths=False)
    # The token that ends an answer is computed too, and not counted as one of its tokens.
    assert outcome.decode_tokens >= 5 + 50
    assert outcome.last[0] < outcome.last[1]
    assert outcome.decode_tokens < 5 + 50 + 8


def test_shared_beginnings_are_found_in_the_cache() -> None:
    arrivals = [request(0.0, 160, 2), request(1.0, 160, 2)]
    outcome = simulate(arrivals, 1, enable_prefix_caching=True)
    assert outcome.cached_tokens == 144
    assert outcome.prefill_tokens == 320 - 144


def test_keys_from_a_traces_blocks_are_as_good_as_hashes() -> None:
    trace = Path(__file__).parents[2] / "data" / "traces" / "mooncake_conversation_500.jsonl"
    with_keys, shared = read_trace(trace, seed=1, most=60)
    assert shared
    assert all(one.chain is not None for one in with_keys)

    def outcome(arrivals: list[Arrival]) -> Outcome:
        config = simulated_config(1, max_num_batched_tokens=2048, enable_prefix_caching=True)
        profile = Profile.load("qwen3-8b-h200")
        return Pipeline(profile, config, num_pages=20000, max_model_len=131072).run(arrivals)

    taken, hashed = outcome(with_keys), outcome([replace(one, chain=None) for one in with_keys])
    assert taken.cached_tokens == hashed.cached_tokens > 0
    assert taken.first.tolist() == hashed.first.tolist()
    assert taken.last.tolist() == hashed.last.tolist()


def test_a_stage_may_be_slowed_from_outside() -> None:
    pipeline = Pipeline(
        flat(),
        simulated_config(2),
        num_pages=100,
        max_model_len=256,
        slowdown=lambda stage, at, seconds: seconds * (3 if stage == 1 and at > 0.003 else 1),
    )
    outcome = pipeline.run([request(0.0, 4, 2)])
    assert outcome.first == pytest.approx([0.004])
    assert outcome.last == pytest.approx([0.004 + 0.002 + 0.006])


def mixed(count: int) -> list[Arrival]:
    """Long prompts come in between many short ones, so that up to half of the time is taken."""
    return [request(0.005 * n, 1500 if n % 10 == 0 else 40, 60) for n in range(count)]


STEEP = flat(layer_s=[(1, 0.0003), (128, 0.0003), (10_000, 0.0203)])  # type: ignore[arg-type]


def test_throttle_leaves_smaller_bubbles_and_shorter_gaps_than_classic() -> None:
    rows = {}
    for policy in ("classic", "throttle"):
        arrivals = mixed(150)
        outcome = simulate(
            arrivals,
            4,
            STEEP,
            schedule_policy=policy,
            max_num_batched_tokens=2048,
        )
        rows[policy] = summarise(arrivals, outcome)
    assert rows["throttle"]["tpot_mean_ms"] < 0.85 * rows["classic"]["tpot_mean_ms"]
    assert sum(rows["throttle"]["bubble_pct"]) < 0.8 * sum(rows["classic"]["bubble_pct"])


@pytest.mark.parametrize("known_lengths", [True, False])
def test_throttle_avoids_nine_of_ten_preemptions(known_lengths: bool) -> None:
    counts = {}
    for policy in ("classic", "throttle"):
        outcome = simulate(
            [request(0.0005 * n, 30, 20 + n % 100) for n in range(400)],
            2,
            schedule_policy=policy,
            max_num_seqs=256,
            pages=500,
            known_lengths=known_lengths,
        )
        counts[policy] = outcome.preemptions
    assert counts["classic"] >= 40
    assert counts["throttle"] <= counts["classic"] // 10


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        simulate([request(0.0, 4000, 400)], 1)
    with pytest.raises(ConfigError, match="--layer-layout must share out the 4 layers"):
        simulate([request(0.0, 4, 4)], 2, layer_layout=[3, 3])
    with pytest.raises(ConfigError, match="4 layers"):
        simulate([request(0.0, 4, 4)], 5)


def test_a_layout_decides_how_long_each_stage_takes() -> None:
    steps: list[Step] = []
    simulate([request(0.0, 4, 2)], 2, steps=steps, layer_layout=[1, 3])
    assert [round(1000 * (end - begin)) for begin, end in zip(
        steps[0].began, steps[0].ended, strict=True
    )] == [1, 3]  # fmt: skip


def test_curves_go_on_beyond_their_ends() -> None:
    curve = [(10.0, 1.0), (20.0, 2.0), (30.0, 4.0)]
    assert interpolate(curve, 1) == 1.0
    assert interpolate(curve, 15) == 1.5
    assert interpolate(curve, 40) == 6.0


@pytest.mark.parametrize("name", ["qwen3-8b-h200", "qwen3-32b-h200"])
def test_profiles_are_readable_and_cost_grows_with_work(name: str) -> None:
    profile = Profile.load(name)
    for curve in (profile.layer_s, profile.head_s):
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(curve))


def test_what_an_engine_learnt_is_a_profile(tmp_path: Path) -> None:
    predictor = StagePredictor(4, has_head=True)
    source = np.random.default_rng(2)
    steps = [
        StepFeatures(int(new), 50.0 * new, int(rows), int(300 * rows), int(rows) + (new > 0))
        for new, rows in zip(source.integers(0, 400, 500), source.integers(1, 60, 500), strict=True)
    ]
    for step in steps:
        predictor.observe(step, 1e-3 + 2e-5 * step.new_tokens + 1e-7 * step.decode_context)
    kept = kept_times.KeptTimes(
        model="m",
        device="d",
        dtype="t",
        layers=4,
        layer=predictor.coefficients[:NUM_LAYER].tolist(),
        head=predictor.coefficients[NUM_LAYER:].tolist(),
    )
    kept_times.write(tmp_path / "learnt.json", kept)
    profile = Profile.load(str(tmp_path / "learnt.json"))
    assert (profile.name, profile.layers) == ("m", 4)
    for step in steps[-20:]:
        found = profile.stage_seconds(step, 4, last=True)
        assert found == pytest.approx(float(np.dot(predictor.vector(step), predictor.coefficients)))
        assert profile.stage_seconds(step, 2, last=False) < found / 2 + 1e-12


def test_an_unknown_profile_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="qwen3-8b-h200"):
        Profile.load("nowhere")
