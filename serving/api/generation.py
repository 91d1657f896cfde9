"""Runs all sequences of one HTTP request and merges what they produce."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from serving.api.choice import Choice, Delta
from serving.api.service import ModelService
from serving.api.service_headers import Wanted
from serving.core import SamplingParams
from serving.errors import OverloadedError

#: Seconds without anything to send after which a waiting stream gets a comment line.
PING_SECONDS = 5.0


@dataclass(frozen=True)
class Ping:
    """Nothing to tell yet, but the stream is alive."""


PING = Ping()


@dataclass(frozen=True)
class Plan:
    """What to generate: every prompt `params.n` times.

    Choice c of prompt p has index p * n + c. `starts_text` as in `Tokenizer.detokenizer`.
    """

    prompts: list[list[int]]
    params: SamplingParams
    cache_salt: str = ""
    starts_text: bool = False
    skip_special_tokens: bool = True


class Generation:
    """The life of one request in the engine.

    Iterate :meth:`events` to the end, or close it: leaving it in any way takes every sequence out
    of the engine before control returns. `wanted` says whose it is and how soon it is wanted.
    """

    def __init__(self, service: ModelService, request_id: str, plan: Plan, wanted: Wanted) -> None:
        self._service = service
        self._engine = service.engine
        self._request_id = request_id
        self._plan = plan
        self._wanted = wanted
        self._arrival = time.monotonic()
        self._queue: asyncio.Queue[Delta | Ping | BaseException] = asyncio.Queue()
        self._refusal: OverloadedError | None = None
        self._last_sent = self._arrival
        self.first_token_seconds: float | None = None
        self.choices = [self._choice(index) for index in range(len(plan.prompts) * plan.params.n)]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self._plan.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        cached = sum(choice.cached_tokens for choice in self.choices[:: self._plan.params.n])
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def events(self) -> AsyncIterator[Delta | Ping]:
        """Deltas of all choices as they come, pings in between while none comes.

        Raises what the engine raises. The engine takes or refuses a sequence at its arrival, long
        before the first ping, so OverloadedError is raised before anything is told: it goes before
        all that has come of other sequences of the request.
        """
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self._run(choice)) for choice in self.choices]
        timer = loop.call_later(PING_SECONDS, self._ping)
        self._timer = timer
        open_choices = len(tasks)
        try:
            while open_choices:
                event = await self._queue.get()
                if self._refusal is not None:
                    self._service.metrics.count_refusal()
                    raise self._refusal
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Delta):
                    open_choices -= event.finish_reason is not None
                self._last_sent = time.monotonic()
                yield event
        finally:
            self._timer.cancel()
            for task in tasks:
                task.cancel()
            # Waiting here makes sure that the engine has been told before this returns.
            await asyncio.gather(*tasks, return_exceptions=True)

    def _choice(self, index: int) -> Choice:
        plan, tokenizer = self._plan, self._service.model.tokenizer
        if tokenizer is None:
            return Choice(index, plan.params, None)
        detokenizer = tokenizer.detokenizer(
            plan.params.stop,
            min_tokens=plan.params.min_tokens,
            skip_special_tokens=plan.skip_special_tokens,
            starts_text=plan.starts_text,
        )
        return Choice(index, plan.params, detokenizer)

    def _ping(self) -> None:
        rest = PING_SECONDS - (time.monotonic() - self._last_sent)
        if rest <= 0.01:
            self._queue.put_nowait(PING)
            rest = PING_SECONDS
        self._timer = asyncio.get_running_loop().call_later(rest, self._ping)

    async def _run(self, choice: Choice) -> None:
        prompt, number = divmod(choice.index, self._plan.params.n)
        prompt_ids = self._plan.prompts[prompt]
        metrics = self._service.metrics
        first: float | None = None
        admitted = False
        reason = "abort"
        try:
            outputs = self._engine.generate(
                prompt_ids,
                self._plan.params,
                request_id=f"{self._request_id}-{choice.index}",
                choice=number,
                cache_salt=self._plan.cache_salt,
                service=self._wanted.of(len(prompt_ids)),
            )
            async with aclosing(cast(Any, outputs)) as stream:
                async for output in stream:
                    now = time.monotonic()
                    if not output.queued and not admitted:
                        admitted = True
                        metrics.observe_queue(now - self._arrival)
                        if number == 0:
                            metrics.count_prompt(len(prompt_ids), output.cached_tokens)
                    if output.token_ids and first is None:
                        first = now
                        metrics.observe_first_token(now - self._arrival)
                        if self.first_token_seconds is None:
                            self.first_token_seconds = now - self._arrival
                    before = choice.num_tokens
                    delta = choice.take(output)
                    if choice.num_tokens > before:
                        metrics.count_generation(choice.num_tokens - before)
                    if delta is not None:
                        if delta.finish_reason is not None:
                            reason = delta.finish_reason
                        self._queue.put_nowait(delta)
                    if choice.finish_reason is not None:
                        break
        except OverloadedError as error:
            reason = "refused"
            self._refusal = error
            self._queue.put_nowait(error)
        except Exception as error:
            # Handed to whoever iterates events(), which raises it there.
            reason = "error"
            self._queue.put_nowait(error)
        finally:
            now = time.monotonic()
            gaps = choice.num_tokens - 1
            tpot = (now - first) / gaps if first is not None and gaps > 0 else None
            if reason != "refused":
                metrics.observe_finish(reason, now - self._arrival, tpot)
