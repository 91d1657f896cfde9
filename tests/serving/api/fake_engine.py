"""An engine without a model: the same interface as `serving.engine.Engine`, scripted answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from serving.config.service import Service
from serving.core import SamplingParams, TokenLogprobs, TokenOutput
from serving.errors import EngineDeadError, OverloadedError
from serving.messages import EngineStats, LayersMoved, Recovering, StageSeconds


@dataclass
class Call:
    prompt: list[int]
    params: SamplingParams
    choice: int
    cache_salt: str
    service: Service | None = None
    given: int = 0
    ended: str = "running"
    life: int = 0


@dataclass
class FakeEngine:
    """Answers every prompt with `reply` over and over, then `eos` unless it is to be ignored.

    `gate` holds answers back while it is cleared; `queue_first` yields a queued output before.
    `refuses` gives the error for a call that is not taken.
    """

    reply: list[int]
    eos: int
    max_model_len: int = 256
    per_output: int = 1
    queue_first: bool = False
    repeat: int = 1
    delay: float = 0.0
    cached: int = 0
    refuses: Callable[[Call], OverloadedError | None] = lambda call: None
    calls: list[Call] = field(default_factory=list)
    restarts: int = 0
    closed: bool = False
    lives: int = 0
    restart_errors: list[Exception] = field(default_factory=list)
    on_stats: Callable[[EngineStats], None] | None = None
    on_move: Callable[[LayersMoved], None] | None = None
    on_recovery: Callable[[Recovering | None], None] | None = None
    state: str = "ready"
    reason: str = ""

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.dead = asyncio.Event()
        self.restart_gate = asyncio.Event()
        self.restart_gate.set()
        self.picture = EngineStats(
            pages_free=10,
            preemptions=3,
            microbatches=[(2, 5)],
            prediction_errors=[0.25, None],
            stages=[StageSeconds(busy=1.5, idle=2.0)],
        )

    @property
    def running(self) -> int:
        return sum(call.ended == "running" for call in self.calls)

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        choice: int = 0,
        cache_salt: str = "",
        service: Service | None = None,
    ) -> AsyncIterator[TokenOutput]:
        call = Call(prompt_token_ids, params, choice, cache_salt, service, life=self.lives)
        self.calls.append(call)
        try:
            if self.queue_first:
                yield TokenOutput(token_ids=[], queued=True)
            if (refusal := self.refuses(call)) is not None:
                raise refusal
            room = self.max_model_len - len(prompt_token_ids)
            limit = room if params.max_tokens is None else params.max_tokens
            script = self.reply * (limit if params.ignore_eos else self.repeat)
            tokens = script[:limit]
            ends = len(script) < limit or len(script) == 0
            for start in range(0, len(tokens), self.per_output):
                await self._wait(call)
                piece = tokens[start : start + self.per_output]
                call.given += len(piece)
                last = start + self.per_output >= len(tokens)
                reason = "length" if last and not ends else None
                yield TokenOutput(
                    token_ids=piece,
                    logprobs=self._logprobs(piece, params),
                    finish_reason=reason,
                    cached_tokens=self.cached,
                )
                if reason:
                    call.ended = reason
                    return
            await self._wait(call)
            call.ended = "stop"
            yield TokenOutput(token_ids=[], finish_reason="stop", stop_token_id=self.eos)
        finally:
            if call.ended == "running":
                call.ended = "aborted"

    def lose_stages(self, reason: str) -> None:
        """The stages died; answers wait until `have_stages`."""
        self.gate.clear()
        self.state, self.reason = "recovering", reason
        if self.on_recovery is not None:
            self.on_recovery(Recovering(reason, self.running))

    def have_stages(self) -> None:
        self.state, self.reason = "ready", ""
        if self.on_recovery is not None:
            self.on_recovery(None)
        self.gate.set()

    def die(self) -> None:
        """End the group as a killed driver would; every open sequence fails."""
        self.lives += 1
        self.dead.set()

    async def _wait(self, call: Call) -> None:
        """Until the gate is open; a death ends the wait."""
        if self.delay:
            await asyncio.sleep(self.delay)
        waits = [asyncio.create_task(self.gate.wait()), asyncio.create_task(self.dead.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self.lives != call.life:
            raise EngineDeadError("A stage ended.")

    def _logprobs(self, ids: list[int], params: SamplingParams) -> list[TokenLogprobs] | None:
        if params.logprobs is None:
            return None
        top = params.logprobs
        return [
            TokenLogprobs(
                token,
                -0.5,
                [token, *range(top)][:top],
                [-0.5, -math.inf, *([-2.0] * top)][:top],
            )
            for token in ids
        ]

    async def wait_dead(self) -> str:
        await self.dead.wait()
        return "stage 1 was killed"

    async def restart(self) -> None:
        await self.restart_gate.wait()
        if self.restart_errors:
            raise self.restart_errors.pop(0)
        self.restarts += 1
        self.dead.clear()

    async def close(self) -> None:
        self.closed = True
        self.die()
