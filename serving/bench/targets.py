"""What a load is run against: an engine in this process, or any OpenAI-style address."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from serving.bench.moves import ForcedMoves
from serving.bench.recording import Recording
from serving.bench.settings import say
from serving.config.engine import EngineConfig
from serving.config.service import Service
from serving.core import SamplingParams
from serving.errors import ConfigError, LecternError, OverloadedError
from serving.messages import LayersMoved, StageSeconds

if TYPE_CHECKING:
    from serving.bench.timeline import Picture
    from serving.engine import Engine


class BenchError(LecternError):
    """A load did not give what was asked for, so its figures would mean nothing."""


@dataclass(frozen=True)
class Times:
    """When the first and the last token came, by the running loop's clock; seconds between two
    arrivals of tokens at most."""

    first: float
    last: float
    longest_gap: float = 0.0


class _Stopwatch:
    """Notes arrivals of tokens; `forced` is told of the time between two."""

    def __init__(self, forced: ForcedMoves | None = None) -> None:
        self._now = asyncio.get_running_loop().time
        self._forced = forced
        self._first = self._last = math.nan
        self._gap = 0.0

    def note(self) -> None:
        now = self._now()
        if math.isnan(self._first):
            self._first = now
        else:
            self._gap = max(self._gap, now - self._last)
            if self._forced is not None:
                self._forced.gap(self._last, now)
        self._last = now

    def times(self) -> Times:
        """As the answer has ended now."""
        return Times(self._first, self._now(), self._gap)


class Target(ABC):
    """Runs one request at a time; many at once on one event loop."""

    #: Tokens of the longest prompt and answer together; None when it is not known.
    context: int | None = None

    @abstractmethod
    async def ask(
        self, prompt: list[int], tokens_out: int, service: Service | None = None, salt: str = ""
    ) -> Times:
        """Run one request. Prompts share KV only under one `salt`.

        Raises OverloadedError when it is refused for want of room, and BenchError unless exactly
        `tokens_out` tokens came.
        """

    def stages(self) -> list[StageSeconds]:
        """Where each stage's time went since the start, as last reported; none from an address."""
        return []

    def prediction_errors(self) -> list[float | None]:
        """Mean relative error of each stage's predicted step times, None where nothing was learnt;
        none from an address."""
        return []

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        """Make layers move while the block runs, where that was asked for."""
        yield

    def moves(self) -> dict[str, Any]:
        """What came of the last such block."""
        return {}

    async def draw(self, picture: Picture, since: float, title: str) -> None:
        """Draw what the stages did since a time of time.monotonic; only of an engine in process
        that records its steps.
        """
        raise AssertionError("an address does not tell when its stages worked")

    @abstractmethod
    async def close(self) -> None: ...


def check_count(got: int, wanted: int) -> None:
    if got != wanted:
        raise BenchError(f"A request gave {got} tokens instead of {wanted}.")


class InProcess(Target):
    """The engine itself: temperature 1, `ignore_eos`, no text made of the tokens."""

    def __init__(self, engine: Engine, forced: ForcedMoves | None = None) -> None:
        self._engine, self._forced = engine, forced
        self.context = engine.max_model_len
        self._recording = Recording(engine.layout.num_stages)
        engine.on_steps = self._recording.take
        self._layouts = {engine.layout.epoch: engine.layout.counts}
        engine.on_move = self._note_move
        engine.on_recovery = lambda news: self._recording.forget()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        progress: Callable[[str], None],
        forced: ForcedMoves | None = None,
    ) -> InProcess:
        from serving.engine import Engine

        return cls(await Engine.start(config, progress), forced)

    async def ask(
        self, prompt: list[int], tokens_out: int, service: Service | None = None, salt: str = ""
    ) -> Times:
        params = SamplingParams(max_tokens=tokens_out, ignore_eos=True, temperature=1.0)
        watch, got = _Stopwatch(self._forced), 0
        outputs = self._engine.generate(prompt, params, cache_salt=salt, service=service)
        async with aclosing(cast(Any, outputs)) as stream:
            async for output in stream:
                if output.token_ids:
                    watch.note()
                got += len(output.token_ids)
        check_count(got, tokens_out)
        return watch.times()

    def stages(self) -> list[StageSeconds]:
        return list(self._engine.stats.stages)

    def prediction_errors(self) -> list[float | None]:
        return list(self._engine.stats.prediction_errors)

    async def draw(self, picture: Picture, since: float, title: str) -> None:
        batches = await self._recording.batches(since)
        picture.write(batches, self._layouts, title)

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        if self._forced is None:
            yield
            return
        async with self._forced.going(self._engine):
            yield

    def moves(self) -> dict[str, Any]:
        return {} if self._forced is None else self._forced.figures()

    def _note_move(self, move: LayersMoved) -> None:
        self._layouts[move.epoch] = move.counts
        if self._forced is not None:
            self._forced.moved(move)
            return
        say(f"{move.why} ({1000 * move.seconds:.0f} ms)")

    async def close(self) -> None:
        await self._engine.close()


class Remote(Target):
    """`/v1/completions` at an address, streaming; tokens are counted by its usage chunk.

    The first token counts as seen with the first chunk, which a server that has a tokenizer may
    hold back until a character is whole. Targets of a request travel as headers.
    """

    def __init__(self, client: Any, model: str, context: int | None) -> None:
        self._client = client
        self._model = model
        self.context = context

    @classmethod
    async def connect(cls, url: str, key: str) -> Remote:
        """Find out the model's name. Raises ConfigError when nothing answers there."""
        import httpx2

        base = url.rstrip("/").removesuffix("/v1")
        client = httpx2.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(3600, connect=10),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )
        try:
            listed = await client.get("/v1/models")
            listed.raise_for_status()
            found = listed.json()["data"][0]
            return cls(client, found["id"], found.get("max_model_len"))
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            await client.aclose()
            raise ConfigError(
                f"No model answers at {base}/v1/models ({error}); give the address of a running "
                "server with --url.",
                "--url",
            ) from error

    async def ask(
        self, prompt: list[int], tokens_out: int, service: Service | None = None, salt: str = ""
    ) -> Times:
        import httpx2

        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens_out,
            "temperature": 1.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if salt:
            body["cache_salt"] = salt
        headers = {} if service is None else service_headers(service)
        watch, got = _Stopwatch(), 0
        try:
            async with self._client.stream(
                "POST", "/v1/completions", json=body, headers=headers
            ) as response:
                await _check_status(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    event = msgspec.json.decode(line[5:])
                    if "error" in event:
                        raise BenchError(f"The server failed: {event['error'].get('message')}")
                    if event["choices"]:
                        watch.note()
                    if event.get("usage"):
                        got = event["usage"]["completion_tokens"]
        except httpx2.HTTPError as error:
            raise BenchError(
                f"The connection to the server broke: {error or type(error).__name__}."
            ) from error
        check_count(got, tokens_out)
        return watch.times()

    async def close(self) -> None:
        await self._client.aclose()


async def _check_status(response: Any) -> None:
    if response.status_code == 200:
        return
    text = (await response.aread()).decode("utf-8", "replace")[:300]
    sentence = f"The server answered {response.status_code}: {text}."
    if response.status_code == 429:
        raise OverloadedError(sentence, 0.0)
    raise BenchError(sentence)


def service_headers(service: Service) -> dict[str, str]:
    """Headers that tell a server a request's program and targets, those in milliseconds.

    A TTFT target must be plain seconds: only the sender knows what its other parts are.
    """
    headers = {
        "X-Lectern-TTFT-Ms": _milliseconds(None if service.ttft is None else service.ttft.seconds),
        "X-Lectern-TPOT-Ms": _milliseconds(service.tpot),
    }
    if service.program:
        headers["X-Lectern-Program"] = service.program
    return headers


def _milliseconds(seconds: float | None) -> str:
    """`none` says best effort, where a server might have a target of its own."""
    return "none" if seconds is None else f"{max(seconds, 1e-6) * 1e3:.3f}"
