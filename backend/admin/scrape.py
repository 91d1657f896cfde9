"""Scrapes the engine's /metrics every two seconds and turns it into figures for a page."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import httpx2
import structlog
from prometheus_client.parser import text_string_to_metric_families

from backend.upstream import Upstream

log = structlog.get_logger("backend.engine")

SCRAPE_SECONDS = 2.0
_HISTORY = 300  # ten minutes
_WINDOW_SECONDS = 60.0  # latencies are those of the last minute
_RATE_SECONDS = 10.0
_PREFIX = "lectern_engine_"
_WANTED = (
    "requests_running", "requests_waiting", "kv_pages", "prompt_tokens", "generation_tokens",
    "preemptions", "time_to_first_token_seconds", "time_per_output_token_seconds", "stage_seconds",
)  # fmt: skip

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scrape:
    """Values of one scrape: by sample name (without prefix), then by labels but model_name."""

    at: float
    values: dict[str, dict[Labels, float]]

    def total(self, name: str) -> float | None:
        found = self.values.get(name)
        return sum(found.values()) if found else None


def parse(text: str, at: float) -> Scrape:
    values: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(_PREFIX) or family.name[len(_PREFIX) :] not in _WANTED:
            continue
        for sample in family.samples:
            labels = tuple(sorted(i for i in sample.labels.items() if i[0] != "model_name"))
            by_labels = values.setdefault(sample.name[len(_PREFIX) :], {})
            by_labels[labels] = by_labels.get(labels, 0.0) + sample.value
    return Scrape(at, values)


def rate(new: Scrape, old: Scrape | None, name: str) -> float | None:
    """Growth a second; after a restart of the engine (a fall) what has grown since counts."""
    now, before = new.total(name), old.total(name) if old else None
    if old is None or now is None or before is None or new.at <= old.at:
        return None
    grown = now - before if now >= before else now
    return grown / (new.at - old.at)


def quantile(new: Scrape, old: Scrape | None, name: str, q: float) -> float | None:
    """Quantile of a histogram over the time between two scrapes, linear inside a bucket
    (as Prometheus' histogram_quantile); None when nothing was observed."""
    buckets = new.values.get(f"{name}_bucket")
    if not buckets:
        return None
    before = old.values.get(f"{name}_bucket", {}) if old else {}
    counts: dict[float, float] = {}
    for labels, value in buckets.items():
        bound = float(dict(labels)["le"])
        earlier = before.get(labels, 0.0)
        counts[bound] = counts.get(bound, 0.0) + (value - earlier if value >= earlier else value)
    bounds = sorted(counts)
    total = counts[bounds[-1]]
    if total <= 0:
        return None
    low, below, rank = 0.0, 0.0, q * total
    for bound in bounds:
        if counts[bound] >= rank:
            if bound == float("inf"):
                return low
            inside = counts[bound] - below
            return low + (bound - low) * ((rank - below) / inside if inside > 0 else 1.0)
        low, below = bound, counts[bound]
    return low


def stages(new: Scrape, old: Scrape | None) -> list[dict[str, Any]]:
    """Share of its time that each stage spent in each state since `old`."""
    seconds = new.values.get("stage_seconds_total", {})
    before = old.values.get("stage_seconds_total", {}) if old else {}
    grown: dict[str, dict[str, float]] = {}
    for labels, value in seconds.items():
        names = dict(labels)
        earlier = before.get(labels, 0.0)
        change = value - earlier if value >= earlier else value
        grown.setdefault(names.get("stage", "0"), {})[names.get("state", "")] = change
    rows = []
    for stage in sorted(grown, key=lambda name: (len(name), name)):
        total = sum(grown[stage].values())
        share = {
            state: round(grown[stage].get(state, 0.0) / total, 4) if total > 0 else None
            for state in ("busy", "wait_input", "wait_link", "idle")
        }
        rows.append({"stage": stage, **share})
    return rows


@dataclass
class EngineWatch:
    """Keeps ten minutes of scrapes in memory."""

    upstream: Upstream
    _scrapes: deque[Scrape] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _series: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _reachable: bool = False

    async def watch(self) -> None:
        while True:
            try:
                await self.scrape()
            except Exception:
                log.exception("the engine's metrics could not be read")
            await asyncio.sleep(SCRAPE_SECONDS)

    async def scrape(self) -> None:
        try:
            response = await self.upstream.client.get("/metrics", timeout=2.0)
        except httpx2.HTTPError:
            self._reachable = await self.upstream.model() is not None
            return
        if response.status_code != 200:
            self._reachable = await self.upstream.model() is not None
            return
        self._reachable = True
        self.take(parse(response.text, time.time()))

    def take(self, new: Scrape) -> None:
        self._scrapes.append(new)
        minute, recent = self._before(new, _WINDOW_SECONDS), self._before(new, _RATE_SECONDS)
        pages = new.values.get("kv_pages", {})
        self._series.append(
            {
                "t": new.at,
                "generation_tokens_s": rate(new, recent, "generation_tokens_total"),
                "requests_running": new.total("requests_running"),
                "ttft_p50_s": quantile(new, minute, "time_to_first_token_seconds", 0.5),
                "tpot_p50_s": quantile(new, minute, "time_per_output_token_seconds", 0.5),
                "kv_used": pages.get((("state", "used"),)),
            }
        )

    def _before(self, new: Scrape, seconds: float) -> Scrape | None:
        """The oldest scrape that is at most `seconds` old, other than `new` itself."""
        for scrape in self._scrapes:
            if scrape is not new and new.at - scrape.at <= seconds:
                return scrape
        return None

    def figures(self, model: str | None) -> dict[str, Any]:
        new = self._scrapes[-1] if self._scrapes and self._reachable else Scrape(0.0, {})
        minute, recent = self._before(new, _WINDOW_SECONDS), self._before(new, _RATE_SECONDS)
        pages = {
            dict(labels).get("state"): v for labels, v in new.values.get("kv_pages", {}).items()
        }
        ttft, tpot = "time_to_first_token_seconds", "time_per_output_token_seconds"
        return {
            "reachable": self._reachable,
            "model": model,
            "requests_running": new.total("requests_running"),
            "requests_waiting": new.total("requests_waiting"),
            "prompt_tokens_s": rate(new, recent, "prompt_tokens_total"),
            "generation_tokens_s": rate(new, recent, "generation_tokens_total"),
            "ttft_p50_s": quantile(new, minute, ttft, 0.5),
            "ttft_p95_s": quantile(new, minute, ttft, 0.95),
            "tpot_p50_s": quantile(new, minute, tpot, 0.5),
            "tpot_p95_s": quantile(new, minute, tpot, 0.95),
            "kv_pages": {state: pages.get(state) for state in ("free", "cached", "used")},
            "preemptions": new.total("preemptions_total"),
            "stages": stages(new, recent),
        }

    def series(self) -> list[dict[str, Any]]:
        return list(self._series)
