"""The overview: figures from scrapes of an engine's real metric names."""

import time

import httpx2
from prometheus_client import CollectorRegistry

from backend.admin.scrape import parse, quantile, rate, stages
from monitoring.metrics import EngineMetrics
from tests.backend.upstream import FakeUpstream
from tests.backend.world import World, wait_for


class Engine:
    """An engine's metrics, as its own process would render them."""

    def __init__(self) -> None:
        self.metrics = EngineMetrics(CollectorRegistry(), "demo")

    def text(self) -> str:
        return self.metrics.render()[0].decode()

    def step(self, tokens: int, ttft: float, busy: float) -> None:
        self.metrics.count_generation(tokens)
        self.metrics.observe_first_token(ttft)
        self.metrics.set_driver_totals(
            running=3,
            waiting=1,
            pages={"free": 90, "cached": 6, "used": 4},
            preemptions=2,
            stage_restarts=0,
            microbatches=1,
            microbatch_tokens={"prefill": 1, "decode": 1},
            stage_seconds={0: {"busy": busy, "idle": 1.0}, 1: {"busy": 1.0, "wait_input": busy}},
        )


def test_rates_and_quantiles_between_two_scrapes() -> None:
    engine = Engine()
    engine.step(100, 0.05, 1.0)
    first = parse(engine.text(), 100.0)
    for _ in range(10):
        engine.step(10, 0.3, 4.0)
    second = parse(engine.text(), 110.0)
    assert rate(second, first, "generation_tokens_total") == 10.0
    assert rate(second, None, "generation_tokens_total") is None
    median = quantile(second, first, "time_to_first_token_seconds", 0.5)
    assert median is not None
    assert 0.25 < median <= 0.5  # the bucket that holds 0.3; the first 0.05 is not in the window
    assert quantile(second, first, "time_per_output_token_seconds", 0.5) is None
    assert stages(second, first) == [
        {"stage": "0", "busy": 1.0, "wait_input": 0.0, "wait_link": 0.0, "idle": 0.0},
        {"stage": "1", "busy": 0.0, "wait_input": 1.0, "wait_link": 0.0, "idle": 0.0},
    ]


def test_a_restarted_engine_never_gives_negative_rates() -> None:
    old, new = Engine(), Engine()
    old.step(1000, 0.1, 9.0)
    new.step(50, 0.1, 1.0)
    before, after = parse(old.text(), 100.0), parse(new.text(), 110.0)
    assert rate(after, before, "generation_tokens_total") == 5.0
    shares = [row["busy"] for row in stages(after, before)]
    assert all(share is None or 0 <= share <= 1 for share in shares)


def test_overview(world: World, fake: FakeUpstream) -> None:
    engine = Engine()
    engine.step(100, 0.05, 1.0)
    fake.metrics = engine.text()
    admin = world.client("admin")

    def figures() -> dict[str, object]:
        found: dict[str, object] = admin.get("/api/admin/overview").json()
        return found

    wait_for(lambda: figures()["engine"]["requests_running"] == 3)  # type: ignore[index]
    shown = figures()
    engine_shown = shown["engine"]
    assert isinstance(engine_shown, dict)
    assert engine_shown["reachable"] is True
    assert engine_shown["model"] == "demo"
    assert engine_shown["kv_pages"] == {"free": 90, "cached": 6, "used": 4}
    assert engine_shown["preemptions"] == 2
    assert [stage["stage"] for stage in engine_shown["stages"]] == ["0", "1"]
    assert shown["series"]
    assert shown["backend"]["users"] == 6  # type: ignore[index]
    assert abs(shown["series"][-1]["t"] - time.time()) < 60  # type: ignore[index]


def test_overview_with_an_upstream_without_metrics(world: World) -> None:
    engine = world.client("admin").get("/api/admin/overview").json()["engine"]
    assert engine["requests_running"] is None
    assert engine["kv_pages"] == {"free": None, "cached": None, "used": None}
    assert engine["stages"] == []


def test_metrics_are_for_this_machine_only(world: World) -> None:
    from starlette.testclient import TestClient

    from backend.app import create_app
    from tests.backend.world import FakeRetrieval

    text = httpx2.get(world.url + "/metrics").text
    assert 'route="/api/' not in text or "{" in text
    with TestClient(
        create_app(world.settings, FakeRetrieval()), client=("203.0.113.5", 1)
    ) as outside:
        assert outside.get("/metrics").status_code == 404
        assert outside.get("/health").status_code == 200


def test_routes_in_metrics_hold_no_ids(world: World) -> None:
    world.client("teacher").get(f"/api/courses/{world.course.id}/documents")
    world.client().get("/nothing/here/1234567")
    text = httpx2.get(world.url + "/metrics").text
    assert 'route="/api/courses/{course_id}/documents"' in text
    assert 'route="unmatched"' in text
    assert "1234567" not in text
