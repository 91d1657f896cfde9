"""Scrape configuration, rules and dashboards, checked by promtool and a real Prometheus."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from monitoring.dashboards import DASHBOARDS, FOLDER, rendered_files
from monitoring.metrics import TTFT_BUCKETS, BackendMetrics, EngineMetrics
from tests.programs import needs

RULES = Path(__file__).parents[2] / "monitoring" / "prometheus"


def dashboards() -> list[dict[str, Any]]:
    return [json.loads((FOLDER / name).read_text()) for name in DASHBOARDS]


def panels() -> list[tuple[str, dict[str, Any]]]:
    return [(board["title"], panel) for board in dashboards() for panel in board["panels"]]


def test_dashboard_files_are_what_the_generator_renders() -> None:
    for path, text in rendered_files().items():
        assert path.read_text() == text, "run: python -m monitoring.dashboards"
    assert set(FOLDER.rglob("*.json")) == set(rendered_files())


def test_panels_are_complete_and_do_not_overlap() -> None:
    for board in dashboards():
        taken: set[tuple[int, int]] = set()
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))
        for panel in board["panels"]:
            assert panel["title"]
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            grid = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(grid["x"], grid["x"] + grid["w"])
                for y in range(grid["y"], grid["y"] + grid["h"])
            }
            assert not cells & taken
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_queries_keep_the_rules_of_the_house() -> None:
    for title, panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            where = f"{title} / {panel['title']}"
            if "rate(" in expression:
                assert "[$__rate_interval]" in expression, where
            if "histogram_quantile" in expression:
                assert "le)" in expression, where


def test_latency_alert_threshold_is_a_bucket_bound() -> None:
    alerts = (RULES / "alerts.yml").read_text()
    assert 'le="2.0"' in alerts
    assert 2.0 in TTFT_BUCKETS


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool = needs("promtool")
    for arguments in (
        ["check", "config", str(RULES / "prometheus.yml")],
        ["check", "rules", str(RULES / "rules.yml"), str(RULES / "alerts.yml")],
        ["test", "rules", str(RULES / "rules_test.yml")],
    ):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that scrapes a registry in which every metric has been used."""
    program = needs("prometheus")
    registry = CollectorRegistry()
    engine, backend = EngineMetrics(registry, "demo"), BackendMetrics(registry)
    use(engine, backend, 1)

    class Exposition(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            use(engine, backend, time.time() % 1000)
            body, content_type = engine.render()
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Exposition)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in ("rules.yml", "alerts.yml"):
        shutil.copy(RULES / name, folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        # Two scrapes are the least from which a rate can be computed.
        while count(address, "count_over_time(lectern_engine_up[1m])") < 3:
            assert time.monotonic() < deadline, "Prometheus did not scrape"
            assert process.poll() is None
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()
        server.shutdown()


def use(engine: EngineMetrics, backend: BackendMetrics, t: float) -> None:
    engine.set_up(True)
    engine.count_prompt(10, 4)
    engine.count_generation(10)
    engine.observe_first_token(0.1)
    engine.observe_queue(0.01)
    engine.observe_finish("stop", 1.0, 0.02)
    engine.set_stage_layers([4, 4])
    engine.count_layer_move(1, 0.02)
    engine.set_prediction_error(0, 0.05)
    engine.set_driver_totals(
        running=1,
        waiting=1,
        pages={"free": 2, "cached": 3, "used": 4},
        preemptions=int(t),
        stage_restarts=int(t),
        microbatches=int(t),
        microbatch_tokens={"prefill": int(t), "decode": int(t)},
        stage_seconds={0: {"busy": t, "wait_input": t, "wait_link": t, "idle": t}},
    )
    backend.http_requests.labels("/v1/models", "GET", "200").inc()
    backend.http_seconds.labels("/v1/models", "GET").observe(0.01)
    backend.search_seconds.observe(0.02)
    backend.login_failures.inc()
    backend.quota_refusals.inc()


def query(address: str, expression: str) -> list[dict[str, Any]]:
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    assert answer["status"] == "success"
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def count(address: str, expression: str) -> int:
    try:
        result = query(address, expression)
    except OSError:
        return 0
    return int(float(result[0]["value"][1])) if result else 0


def test_every_panel_finds_data(prometheus: str) -> None:
    for title, panel in panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m")
            expression = expression.replace("$model_name", ".*")
            result = query(prometheus, expression)
            assert result, f"{title} / {panel['title']} is empty: {expression}"


def test_every_recording_rule_finds_data(prometheus: str) -> None:
    deadline = time.monotonic() + 30
    rules = yaml.safe_load((RULES / "rules.yml").read_text())["groups"][0]["rules"]
    assert rules
    for rule in rules:
        while not query(prometheus, rule["record"]):
            assert time.monotonic() < deadline, rule["record"]
            time.sleep(0.5)
