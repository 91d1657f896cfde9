"""Grafana dashboards, written as Python and rendered to the JSON that Grafana provisions.

``python -m monitoring.dashboards`` writes the files below ``monitoring/grafana/dashboards``;
a test fails when they differ from what this module renders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24  # columns of Grafana's grid
_MODEL = 'model_name=~"$model_name"'


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are (PromQL, legend); `width` is in grid columns."""

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False


def _rate(metric: str, by: str = "model_name", more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{_MODEL}{more}}}[$__rate_interval]))"


def _quantile(q: float, metric: str) -> str:
    return f"histogram_quantile({q}, {_rate(metric + '_bucket', 'model_name, le')})"


ENGINE = (
    Panel(
        "Engine up",
        "1 while a token can be produced.",
        "short",
        [(f"min(lectern_engine_up{{{_MODEL}}})", "up")],
        "stat",
        4,
        5,
    ),
    Panel(
        "Running",
        "Sequences that hold KV pages.",
        "short",
        [(f"sum(lectern_engine_requests_running{{{_MODEL}}})", "running")],
        "stat",
        4,
        5,
    ),
    Panel(
        "Waiting",
        "Sequences that wait for their first chunk.",
        "short",
        [(f"sum(lectern_engine_requests_waiting{{{_MODEL}}})", "waiting")],
        "stat",
        4,
        5,
    ),
    Panel(
        "Output tokens a second",
        "Tokens given to clients.",
        "short",
        [(_rate("lectern_engine_generation_tokens_total"), "{{model_name}}")],
        "stat",
        4,
        5,
    ),
    Panel(
        "KV pages in use",
        "Share of all pages that running sequences hold.",
        "percentunit",
        [
            (
                f'sum(lectern_engine_kv_pages{{{_MODEL}, state="used"}}) '
                f"/ sum(lectern_engine_kv_pages{{{_MODEL}}})",
                "used",
            )
        ],
        "stat",
        4,
        5,
    ),
    Panel(
        "Restarts",
        "Restarts after a death in the last hour: of the whole engine, and of its stages alone.",
        "short",
        [
            (f"sum(increase(lectern_engine_restarts_total{{{_MODEL}}}[1h]))", "engine"),
            (f"sum(increase(lectern_engine_stage_restarts_total{{{_MODEL}}}[1h]))", "stages"),
        ],
        "stat",
        4,
        5,
    ),
    Panel(
        "Tokens",
        "Prompt tokens accepted and tokens given to clients, a second.",
        "short",
        [
            (_rate("lectern_engine_prompt_tokens_total"), "prompt {{model_name}}"),
            (_rate("lectern_engine_generation_tokens_total"), "output {{model_name}}"),
            (_rate("lectern_engine_cached_prompt_tokens_total"), "from cache {{model_name}}"),
        ],
    ),
    Panel(
        "Time to first token",
        "Arrival to first token.",
        "s",
        [
            (_quantile(q, "lectern_engine_time_to_first_token_seconds"), f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)
        ],
    ),
    Panel(
        "Time per output token",
        "Mean gap between a request's tokens.",
        "s",
        [
            (_quantile(q, "lectern_engine_time_per_output_token_seconds"), f"p{q * 100:g}")
            for q in (0.5, 0.95, 0.99)
        ],
    ),
    Panel(
        "Requests",
        "Sequences in the engine.",
        "short",
        [
            (f"sum by (model_name) (lectern_engine_requests_running{{{_MODEL}}})", "running"),
            (f"sum by (model_name) (lectern_engine_requests_waiting{{{_MODEL}}})", "waiting"),
        ],
        stacked=True,
    ),
    Panel(
        "KV pages",
        "Pages by state; their sum is constant.",
        "short",
        [(f"sum by (state) (lectern_engine_kv_pages{{{_MODEL}}})", "{{state}}")],
        stacked=True,
    ),
    Panel(
        "Finished and refused requests",
        "Sequences that ended, a second, by reason; requests refused because too many waited.",
        "reqps",
        [
            (
                _rate("lectern_engine_requests_finished_total", "finish_reason"),
                "{{finish_reason}}",
            ),
            (_rate("lectern_engine_requests_refused_total"), "refused {{model_name}}"),
        ],
    ),
    Panel(
        "What each stage is doing",
        "Share of time per stage: busy, waiting for input, waiting for the link, idle.",
        "percentunit",
        [
            (
                _rate("lectern_engine_stage_seconds_total", "stage, state"),
                "stage {{stage}} {{state}}",
            )
        ],
        width=12,
        stacked=True,
    ),
    Panel(
        "Tokens in micro-batches",
        "Prefill and decode tokens planned, a second.",
        "short",
        [(_rate("lectern_engine_microbatch_tokens_total", "kind"), "{{kind}}")],
        width=6,
        stacked=True,
    ),
    Panel(
        "Preemptions",
        "Sequences put back to be computed again, a second.",
        "short",
        [(_rate("lectern_engine_preemptions_total"), "{{model_name}}")],
        width=6,
    ),
    Panel(
        "Layers of each stage",
        "Layers that a stage computes; they move when another division is predicted to be faster.",
        "short",
        [
            (
                f"max by (model_name, stage) (lectern_engine_stage_layers{{{_MODEL}}})",
                "stage {{stage}}",
            )
        ],
        stacked=True,
    ),
    Panel(
        "Moves of layers",
        "Moves in the last hour, by the stage that was predicted slowest.",
        "short",
        [
            (
                "sum by (slowest_stage) "
                f"(increase(lectern_engine_layer_moves_total{{{_MODEL}}}[1h]))",
                "stage {{slowest_stage}}",
            )
        ],
        width=6,
    ),
    Panel(
        "Predictions",
        "Mean relative error of late predictions of each stage's step time.",
        "percentunit",
        [
            (
                f"max by (stage) (lectern_engine_step_prediction_error_ratio{{{_MODEL}}})",
                "stage {{stage}}",
            )
        ],
        width=6,
    ),
)

PLATFORM = (
    Panel(
        "HTTP requests",
        "Requests a second by status.",
        "reqps",
        [
            (
                "sum by (status) (rate(lectern_backend_http_requests_total[$__rate_interval]))",
                "{{status}}",
            )
        ],
    ),
    Panel(
        "Slowest routes",
        "95th percentile of the time to the end of the body.",
        "s",
        [
            (
                "topk(5, histogram_quantile(0.95, sum by (route, le) "
                "(rate(lectern_backend_http_request_seconds_bucket[$__rate_interval]))))",
                "{{route}}",
            )
        ],
    ),
    Panel(
        "Open streams",
        "Streams from the backend to the engine.",
        "short",
        [("sum(lectern_backend_gateway_streams)", "streams")],
    ),
    Panel(
        "Search time",
        "Hybrid search of course documents.",
        "s",
        [
            (
                "histogram_quantile(0.95, sum by (le) "
                "(rate(lectern_backend_search_seconds_bucket[$__rate_interval])))",
                "p95",
            )
        ],
    ),
    Panel(
        "Documents",
        "Documents by state of their indexing.",
        "short",
        [("sum by (state) (lectern_backend_index_jobs)", "{{state}}")],
    ),
    Panel(
        "Refused",
        "Failed logins and used-up budgets, a second.",
        "short",
        [
            ("sum(rate(lectern_backend_login_failures_total[$__rate_interval]))", "logins"),
            ("sum(rate(lectern_backend_quota_refusals_total[$__rate_interval]))", "budgets"),
        ],
    ),
)

#: file below FOLDER -> (title, uid, panels)
DASHBOARDS: dict[str, tuple[str, str, Sequence[Panel]]] = {
    "Lectern/engine.json": ("Lectern: engine", "lectern-engine", ENGINE),
    "Lectern/platform.json": ("Lectern: platform", "lectern-platform", PLATFORM),
}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line",
            "fillOpacity": 25 if panel.stacked else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _layout(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Place panels in rows from left to right; a panel that does not fit begins a new row."""
    placed = []
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _WIDTH:
            x, y, row_height = 0, y + row_height, 0
        placed.append(_panel(panel, number, x, y))
        x += panel.width
        row_height = max(row_height, panel.height)
    return placed


def render(title: str, uid: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Return a dashboard in Grafana's classic JSON model."""
    variables: list[dict[str, Any]] = [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
        }
    ]
    if any("$model_name" in query for panel in panels for query, _ in panel.queries):
        variables.append(
            {
                "name": "model_name",
                "label": "Model",
                "type": "query",
                "datasource": _DATASOURCE,
                "query": "label_values(lectern_engine_up, model_name)",
                "refresh": 2,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {},
            }
        )
    return {
        "id": None,
        "uid": uid,
        "title": title,
        "tags": ["lectern"],
        "schemaVersion": 41,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "title": "Lectern",
                "type": "dashboards",
                "tags": ["lectern"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": variables},
        "panels": _layout(panels),
    }


def rendered_files() -> dict[Path, str]:
    """Return the content of every dashboard file."""
    return {
        FOLDER / name: json.dumps(render(*dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def main() -> None:
    """Write every dashboard file."""
    for path, text in rendered_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
