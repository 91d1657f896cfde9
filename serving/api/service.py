"""The model that this process serves: its engine, its tokenizer, and what state they are in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from monitoring.metrics import EngineMetrics
from serving.api.classes import Targets, service_classes
from serving.api.errors import NotReadyError
from serving.api.logs import log
from serving.config.service import Service
from serving.core import SamplingParams, TokenOutput
from serving.errors import ConfigError, LecternError, ModelError
from serving.messages import EngineStats, LayersMoved, Recovering
from serving.tokenizer import Tokenizer

#: Restarts in a row that may fail before the process gives up.
MAX_FAILED_RESTARTS = 5

State = Literal["starting", "ready", "restarting", "stopping", "failed"]


class EngineLike(Protocol):
    """What the API needs of `serving.engine.Engine`."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...

    #: Called with every new picture of the driver.
    on_stats: Callable[[EngineStats], None] | None
    #: Called when layers have moved between stages.
    on_move: Callable[[LayersMoved], None] | None

    #: Called when stages died and are replaced, and with None when that is done.
    on_recovery: Callable[[Recovering | None], None] | None

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        choice: int = 0,
        cache_salt: str = "",
        service: Service | None = None,
    ) -> AsyncIterator[TokenOutput]: ...

    async def wait_dead(self) -> str: ...

    async def restart(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """What does not change while the process lives. `created` is in Unix seconds."""

    name: str
    vocab_size: int
    tokenizer: Tokenizer | None
    untrained: bool = False
    created: int = 0


class ModelService:
    """Owns the engine: starts it, watches it, restarts it when it dies, closes it.

    `classes` are those a request may name; by default the built-in ones. `on_failure` is called
    once when restarting has been given up.
    """

    def __init__(
        self,
        model: ServedModel,
        start_engine: Callable[[], Awaitable[EngineLike]],
        metrics: EngineMetrics,
        on_failure: Callable[[str], None] | None = None,
        classes: Mapping[str, Targets] | None = None,
    ) -> None:
        self.model = model
        self.classes = service_classes() if classes is None else classes
        self.metrics = metrics
        self.state: State = "starting"
        #: Why restarting was given up; empty until then.
        self.failure = ""
        self._start_engine = start_engine
        self._on_failure = on_failure
        self._engine: EngineLike | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._recovering_since: float | None = None
        self._microbatches = 0
        self._microbatch_tokens = {"prefill": 0, "decode": 0}

    async def start(self) -> None:
        """Start the engine and make it produce one token. Raises what the engine raises."""
        self._engine = await self._start_engine()
        self._engine.on_stats = self.take_stats
        self._engine.on_move = self.take_move
        self._engine.on_recovery = self._take_recovery
        await self._produce_a_token()
        self._become_ready()
        self._watcher = asyncio.create_task(self._watch())

    @property
    def engine(self) -> EngineLike:
        """The engine, which takes requests. Raises NotReadyError while it does not."""
        if self.state == "ready" and self._engine is not None:
            return self._engine
        if self.state == "restarting":
            raise NotReadyError(
                "The engine is being restarted; send the request again in a few seconds.",
                "engine_restarting",
            )
        if self.state == "starting":
            raise NotReadyError(
                "The engine is starting; send the request again in a few seconds.",
                "engine_starting",
            )
        raise NotReadyError("The engine is stopping.", "engine_stopping")

    def check_health(self) -> None:
        """Raise NotReadyError unless a token can be produced now. Requests may be taken before."""
        engine = self.engine
        if engine.state == "recovering":
            raise NotReadyError(
                f"{engine.reason} The stages are being started again; requests wait for them.",
                "engine_restarting",
            )

    @property
    def stopping(self) -> bool:
        """True once the engine will not be restarted."""
        return self.state in ("stopping", "failed")

    async def close(self) -> None:
        """Stop the engine; open streams end with an error event."""
        self.state = "stopping"
        self.metrics.set_up(False)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    def _become_ready(self) -> None:
        self.state = "ready"
        self._show_up()

    def _show_up(self) -> None:
        assert self._engine is not None
        self.metrics.set_up(self.state == "ready" and self._engine.state == "ready")

    async def _produce_a_token(self) -> None:
        assert self._engine is not None
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        async for _ in self._engine.generate([0], params, request_id="start"):
            pass

    def _take_recovery(self, recovering: Recovering | None) -> None:
        """The engine's driver replaces stages that died, or has done so."""
        now = time.monotonic()
        if self._recovering_since is None:
            self._recovering_since = now
        if recovering is not None:
            log(
                logging.ERROR,
                "a stage died and the stages are being restarted",
                reason=recovering.reason,
                requests=recovering.requests,
            )
        else:
            took = now - self._recovering_since
            self._recovering_since = None
            log(logging.WARNING, "the stages are ready again", seconds=took)
        self._show_up()

    async def _watch(self) -> None:
        assert self._engine is not None
        while True:
            reason = await self._engine.wait_dead()
            self.state = "restarting"
            self.metrics.set_up(False)
            log(logging.ERROR, "the engine died and is being restarted", reason=reason)
            began = time.monotonic()
            if not await self._restart():
                return
            self._become_ready()
            took = time.monotonic() - began
            log(logging.WARNING, "the engine is ready again", seconds=took)

    async def _restart(self) -> bool:
        assert self._engine is not None
        for attempt in range(1, MAX_FAILED_RESTARTS + 1):
            try:
                self._forget_driver()
                self.metrics.count_restart()
                await self._engine.restart()
                await self._produce_a_token()
                return True
            except LecternError as error:
                log(
                    logging.ERROR,
                    "the engine could not be restarted",
                    attempt=f"{attempt}/{MAX_FAILED_RESTARTS}",
                    reason=str(error),
                )
                lasting = isinstance(error, ConfigError | ModelError)
                if lasting or attempt == MAX_FAILED_RESTARTS:
                    self.state = "failed"
                    self.failure = str(error)
                    if self._on_failure is not None:
                        self._on_failure(str(error))
                    return False
            await asyncio.sleep(min(2.0 ** (attempt - 1), 15.0))
        return False

    def _forget_driver(self) -> None:
        self._recovering_since = None
        self._microbatches = 0
        self._microbatch_tokens = {"prefill": 0, "decode": 0}

    def take_move(self, move: LayersMoved) -> None:
        """Layers moved between stages: log why, and count it."""
        self.metrics.count_layer_move(move.slowest, move.seconds)
        self.metrics.set_stage_layers(move.counts)
        log(
            logging.INFO,
            "layers moved between stages",
            before=_listed(move.before),
            now=_listed(move.counts),
            seconds=move.seconds,
            why=move.why,
        )

    def take_stats(self, stats: EngineStats) -> None:
        """Store a picture of the driver in the metrics."""
        for decode, prefill in stats.microbatches:
            self._microbatches += 1
            self._microbatch_tokens["decode"] += decode
            self._microbatch_tokens["prefill"] += prefill
            self.metrics.observe_microbatch(decode, prefill)
        for number, error in enumerate(stats.prediction_errors):
            if error is not None:
                self.metrics.set_prediction_error(number, error)
        self.metrics.set_stage_layers(stats.layers)
        self.metrics.set_driver_totals(
            running=stats.running,
            waiting=stats.waiting,
            pages={
                "free": stats.pages_free,
                "cached": stats.pages_cached,
                "used": stats.pages_used,
            },
            preemptions=stats.preemptions,
            stage_restarts=stats.restarts,
            microbatches=self._microbatches,
            microbatch_tokens=self._microbatch_tokens,
            stage_seconds={
                number: {
                    "busy": stage.busy,
                    "wait_input": stage.wait_input,
                    "wait_link": stage.wait_link,
                    "idle": stage.idle,
                }
                for number, stage in enumerate(stats.stages)
            },
        )


def _listed(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))
