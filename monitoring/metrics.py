"""Every metric name of Lectern, defined once.

Names start with ``lectern_``, units are seconds, bytes or tokens, counters end in ``_total``.
Label values come from closed sets: never a user, a key, a course or a path with ids in it.
One process owns a registry: the engine's API process and the backend each make their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

# The `_created` series double the number of time series and nothing reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Upper bounds in seconds. The SLO thresholds of alert rules must be exact members.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TPOT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

PAGE_STATES = ("free", "cached", "used")
STAGE_STATES = ("busy", "wait_input", "wait_link", "idle")
FINISH_REASONS = ("stop", "length", "abort", "error")
TOKEN_KINDS = ("prefill", "decode")
JOB_STATES = ("queued", "indexing", "ready", "failed")


class EngineMetrics:
    """Metrics of one engine; label `model_name` is the served name.

    Request events are observed as they happen. Everything the driver counts (pages, stages,
    preemptions) arrives as running totals and is stored by :meth:`set_driver_totals`.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.registry = registry
        self._model = {"model_name": model_name}
        self._last: dict[tuple[str, ...], float] = {}
        model = ("model_name",)

        def gauge(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"lectern_engine_{name}", help_text, (*model, *labels), registry=registry)

        def counter(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(
                f"lectern_engine_{name}", help_text, (*model, *labels), registry=registry
            )

        def histogram(
            name: str, help_text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(
                f"lectern_engine_{name}",
                help_text,
                (*model, *labels),
                buckets=buckets,
                registry=registry,
            )

        self._up = gauge("up", "1 while the engine can produce a token, else 0.")
        self._running = gauge("requests_running", "Sequences that hold KV pages.")
        self._waiting = gauge("requests_waiting", "Sequences that wait for their first chunk.")
        self._pages = gauge("kv_pages", "KV pages by state.", ("state",))
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self._generation_tokens = counter("generation_tokens_total", "Tokens given to clients.")
        self._cached_tokens = counter(
            "cached_prompt_tokens_total", "Prompt tokens whose KV came from the prefix cache."
        )
        self._preemptions = counter(
            "preemptions_total", "Sequences put back to be computed again for want of pages."
        )
        self._finished = counter(
            "requests_finished_total", "Sequences that ended, by reason.", ("finish_reason",)
        )
        self._refused = counter(
            "requests_refused_total", "Requests refused on arrival because too many wait."
        )
        self._restarts = counter("restarts_total", "Restarts of the whole engine after a death.")
        self._stage_restarts = counter(
            "stage_restarts_total", "Restarts of the stages alone; unfinished requests went on."
        )
        self._ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS
        )
        self._tpot = histogram(
            "time_per_output_token_seconds",
            "Mean gap between the tokens of a request after its first.",
            TPOT_BUCKETS,
        )
        self._request = histogram("request_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self._queue = histogram(
            "queue_seconds", "Arrival to the first chunk being planned.", TTFT_BUCKETS
        )
        self._stage_seconds = counter(
            "stage_seconds_total",
            "Seconds each pipeline stage spent, by state.",
            ("stage", "state"),
        )
        self._microbatch_tokens = counter(
            "microbatch_tokens_total", "Tokens that micro-batches held, by kind.", ("kind",)
        )
        self._microbatches = counter("microbatches_total", "Micro-batches planned.")
        self._microbatch_size = histogram(
            "microbatch_size_tokens",
            "Tokens in one micro-batch, by kind; those without any of a kind count as 0.",
            TOKEN_BUCKETS,
            ("kind",),
        )
        self._prediction_error = gauge(
            "step_prediction_error_ratio",
            "Mean relative error of late predictions of a stage's step time.",
            ("stage",),
        )
        self._stage_layers = gauge("stage_layers", "Layers that a stage computes.", ("stage",))
        self._layer_moves = counter(
            "layer_moves_total",
            "Moves of layers between stages, by the stage that was predicted slowest; asked where "
            "somebody wanted it.",
            ("slowest_stage",),
        )
        self._layer_move_seconds = histogram(
            "layer_move_seconds", "Decision to switch of a move of layers.", TTFT_BUCKETS
        )
        # Series that exist from the start read 0 instead of being absent.
        for single in (self._up, self._running, self._waiting):
            single.labels(**self._model).set(0)
        for total in (
            self._prompt_tokens,
            self._cached_tokens,
            self._preemptions,
            self._refused,
            self._restarts,
            self._stage_restarts,
            self._microbatches,
        ):
            total.labels(**self._model)
        # Looking a label up costs more than the addition, and this one happens for every token.
        self._generated = self._generation_tokens.labels(**self._model)
        for reason in FINISH_REASONS:
            self._finished.labels(**self._model, finish_reason=reason)
        for kind in TOKEN_KINDS:
            self._microbatch_tokens.labels(**self._model, kind=kind)
        for state in PAGE_STATES:
            self._pages.labels(**self._model, state=state).set(0)

    def set_up(self, up: bool) -> None:
        self._up.labels(**self._model).set(1 if up else 0)

    def count_prompt(self, tokens: int, cached: int = 0) -> None:
        self._prompt_tokens.labels(**self._model).inc(tokens)
        if cached:
            self._cached_tokens.labels(**self._model).inc(cached)

    def count_generation(self, tokens: int) -> None:
        self._generated.inc(tokens)

    def count_refusal(self) -> None:
        self._refused.labels(**self._model).inc()

    def count_restart(self) -> None:
        """The whole engine is started again: the driver's totals begin at zero."""
        self._restarts.labels(**self._model).inc()
        self._last.clear()

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.labels(**self._model).observe(seconds)

    def observe_queue(self, seconds: float) -> None:
        self._queue.labels(**self._model).observe(seconds)

    def observe_finish(
        self, finish_reason: str, request_seconds: float, tpot_seconds: float | None
    ) -> None:
        """`tpot_seconds` is None for requests of fewer than two tokens."""
        self._finished.labels(**self._model, finish_reason=finish_reason).inc()
        self._request.labels(**self._model).observe(request_seconds)
        if tpot_seconds is not None:
            self._tpot.labels(**self._model).observe(tpot_seconds)

    def observe_microbatch(self, decode: int, prefill: int) -> None:
        """A micro-batch was planned with so many tokens of each kind."""
        for kind, tokens in (("decode", decode), ("prefill", prefill)):
            self._microbatch_size.labels(**self._model, kind=kind).observe(tokens)

    def set_prediction_error(self, stage: int, ratio: float) -> None:
        self._prediction_error.labels(**self._model, stage=str(stage)).set(ratio)

    def set_stage_layers(self, counts: Sequence[int]) -> None:
        for stage, layers in enumerate(counts):
            self._stage_layers.labels(**self._model, stage=str(stage)).set(layers)

    def count_layer_move(self, slowest_stage: int | None, seconds: float) -> None:
        """Layers moved for the sake of a stage, or because that was asked for (None)."""
        why = "asked" if slowest_stage is None else str(slowest_stage)
        self._layer_moves.labels(**self._model, slowest_stage=why).inc()
        self._layer_move_seconds.labels(**self._model).observe(seconds)

    def set_driver_totals(
        self,
        *,
        running: int,
        waiting: int,
        pages: Mapping[str, int],
        preemptions: int,
        stage_restarts: int,
        microbatches: int,
        microbatch_tokens: Mapping[str, int],
        stage_seconds: Mapping[int, Mapping[str, float]],
    ) -> None:
        """Store the driver's latest figures; totals only ever grow between two restarts."""
        self._running.labels(**self._model).set(running)
        self._waiting.labels(**self._model).set(waiting)
        for state, count in pages.items():
            self._pages.labels(**self._model, state=state).set(count)
        self._advance(self._preemptions, preemptions, "preemptions")
        self._advance(self._stage_restarts, stage_restarts, "stage_restarts")
        self._advance(self._microbatches, microbatches, "microbatches")
        for kind, tokens in microbatch_tokens.items():
            self._advance(self._microbatch_tokens, tokens, "tokens", kind=kind)
        for stage, states in stage_seconds.items():
            for state, seconds in states.items():
                self._advance(self._stage_seconds, seconds, "stage", stage=str(stage), state=state)

    def _advance(self, counter: Counter, total: float, key: str, **labels: str) -> None:
        full = (key, *labels.values())
        grown = total - self._last.get(full, 0.0)
        self._last[full] = total
        series = counter.labels(**self._model, **labels)
        if grown > 0:
            series.inc(grown)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class BackendMetrics:
    """Metrics of the backend process. `route` is the path template, never a path with ids."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.http_requests = Counter(
            "lectern_backend_http_requests_total",
            "HTTP requests answered.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.http_seconds = Histogram(
            "lectern_backend_http_request_seconds",
            "Time to the end of the response body.",
            ("route", "method"),
            buckets=HTTP_BUCKETS,
            registry=registry,
        )
        self.gateway_streams = Gauge(
            "lectern_backend_gateway_streams", "Streams open to the engine.", registry=registry
        )
        self.gateway_tokens = Counter(
            "lectern_backend_gateway_tokens_total",
            "Tokens settled, by kind.",
            ("kind",),
            registry=registry,
        )
        self.upstream_errors = Counter(
            "lectern_backend_upstream_errors_total",
            "Failed calls to the engine, by reason.",
            ("reason",),
            registry=registry,
        )
        self.quota_refusals = Counter(
            "lectern_backend_quota_refusals_total",
            "Calls refused because a budget was used up.",
            registry=registry,
        )
        self.index_jobs = Gauge(
            "lectern_backend_index_jobs", "Documents by state.", ("state",), registry=registry
        )
        self.search_seconds = Histogram(
            "lectern_backend_search_seconds",
            "Time of one hybrid search.",
            buckets=HTTP_BUCKETS,
            registry=registry,
        )
        self.login_failures = Counter(
            "lectern_backend_login_failures_total", "Refused logins.", registry=registry
        )
        self.sessions = Gauge(
            "lectern_backend_sessions", "Sessions that have not expired.", registry=registry
        )
        for state in JOB_STATES:
            self.index_jobs.labels(state=state).set(0)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
