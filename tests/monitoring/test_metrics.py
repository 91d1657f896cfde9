"""Names and behaviour of the metrics."""

import re

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import BackendMetrics, EngineMetrics


def sample(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                return one.value
    raise AssertionError(f"{name} {labels} is not exposed")


def driver_totals(engine: EngineMetrics, preemptions: int, busy: float) -> None:
    engine.set_driver_totals(
        running=3,
        waiting=2,
        pages={"free": 5, "cached": 1, "used": 4},
        preemptions=preemptions,
        stage_restarts=preemptions,
        microbatches=7,
        microbatch_tokens={"prefill": 100, "decode": 20},
        stage_seconds={0: {"busy": busy, "idle": 0.5}},
    )


def test_names_are_ours_and_in_base_units() -> None:
    registry = CollectorRegistry()
    EngineMetrics(registry, "m")
    BackendMetrics(registry)
    for family in registry.collect():
        assert re.fullmatch(r"lectern_(engine|backend)_[a-z_]+", family.name)
        assert not re.search(r"_(ms|millis|minutes|percent|mb)$", family.name)
        assert family.documentation.endswith(".")
        assert not any(s.name.endswith("_created") for s in family.samples)


def test_request_events() -> None:
    engine = EngineMetrics(CollectorRegistry(), "m")
    engine.set_up(True)
    engine.count_prompt(100, cached=32)
    engine.count_generation(5)
    engine.observe_first_token(0.2)
    assert sample(engine.render()[0].decode(), "lectern_engine_requests_refused_total") == 0
    engine.count_refusal()
    engine.observe_finish("stop", 1.0, 0.05)
    engine.observe_finish("length", 1.0, None)
    text = engine.render()[0].decode()
    assert sample(text, "lectern_engine_up", model_name="m") == 1
    assert sample(text, "lectern_engine_prompt_tokens_total") == 100
    assert sample(text, "lectern_engine_cached_prompt_tokens_total") == 32
    assert sample(text, "lectern_engine_generation_tokens_total") == 5
    assert sample(text, "lectern_engine_requests_finished_total", finish_reason="stop") == 1
    assert sample(text, "lectern_engine_time_per_output_token_seconds_count") == 1
    assert sample(text, "lectern_engine_request_seconds_count") == 2
    assert sample(text, "lectern_engine_requests_refused_total") == 1
    assert sample(text, "lectern_engine_time_to_first_token_seconds_bucket", le="0.25") == 1
    assert sample(text, "lectern_engine_time_to_first_token_seconds_bucket", le="0.1") == 0


def test_sizes_of_micro_batches_and_errors_of_predictions() -> None:
    engine = EngineMetrics(CollectorRegistry(), "m")
    engine.observe_microbatch(8, 0)
    engine.observe_microbatch(8, 500)
    engine.set_prediction_error(1, 0.04)
    text = engine.render()[0].decode()
    name = "lectern_engine_microbatch_size_tokens"
    assert sample(text, f"{name}_sum", kind="prefill") == 500
    assert sample(text, f"{name}_bucket", kind="prefill", le="1.0") == 1
    assert sample(text, f"{name}_count", kind="decode") == 2
    assert sample(text, "lectern_engine_step_prediction_error_ratio", stage="1") == 0.04


def test_moves_of_layers() -> None:
    engine = EngineMetrics(CollectorRegistry(), "m")
    engine.set_stage_layers([9, 7])
    engine.count_layer_move(1, 0.06)
    engine.count_layer_move(None, 0.3)
    engine.set_stage_layers([10, 6])
    text = engine.render()[0].decode()
    assert sample(text, "lectern_engine_stage_layers", stage="1") == 6
    assert sample(text, "lectern_engine_layer_moves_total", slowest_stage="1") == 1
    assert sample(text, "lectern_engine_layer_moves_total", slowest_stage="asked") == 1
    assert sample(text, "lectern_engine_layer_move_seconds_bucket", le="0.1") == 1
    assert sample(text, "lectern_engine_layer_move_seconds_count") == 2


def test_driver_totals_grow_and_survive_a_restart_of_the_driver() -> None:
    engine = EngineMetrics(CollectorRegistry(), "m")
    driver_totals(engine, preemptions=2, busy=1.5)
    driver_totals(engine, preemptions=3, busy=2.0)
    engine.count_restart()
    driver_totals(engine, preemptions=1, busy=0.25)
    text = engine.render()[0].decode()
    assert sample(text, "lectern_engine_preemptions_total") == 4
    assert sample(text, "lectern_engine_stage_restarts_total") == 4
    assert sample(text, "lectern_engine_stage_seconds_total", stage="0", state="busy") == 2.25
    assert sample(text, "lectern_engine_kv_pages", state="used") == 4
    assert sample(text, "lectern_engine_requests_waiting") == 2
    assert sample(text, "lectern_engine_restarts_total") == 1
