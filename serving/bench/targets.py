"""What a load is run against: an engine in this process, or any OpenAI-style address."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import msgspec

from serving.config.engine import EngineConfig
from serving.core import SamplingParams
from serving.errors import ConfigError, LecternError
from serving.messages import StageSeconds

if TYPE_CHECKING:
    from serving.engine import Engine


class BenchError(LecternError):
    """A load did not give what was asked for, so its figures would mean nothing."""


class Target(ABC):
    """Runs one request at a time; many at once on one event loop."""

    @abstractmethod
    async def run(self, prompt: list[int], tokens_out: int) -> tuple[float, float]:
        """Return the times of the first and of the last token, by `time.perf_counter`.

        Raises BenchError unless exactly `tokens_out` tokens came.
        """

    def stages(self) -> list[StageSeconds]:
        """Where each stage's time went since the start, as last reported; none from an address."""
        return []

    @abstractmethod
    async def close(self) -> None: ...


def check_count(got: int, wanted: int) -> None:
    if got != wanted:
        raise BenchError(f"A request gave {got} tokens instead of {wanted}.")


class InProcess(Target):
    """The engine itself: temperature 1, `ignore_eos`, no text made of the tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    async def start(cls, config: EngineConfig, progress: Callable[[str], None]) -> InProcess:
        from serving.engine import Engine

        return cls(await Engine.start(config, progress))

    async def run(self, prompt: list[int], tokens_out: int) -> tuple[float, float]:
        params = SamplingParams(max_tokens=tokens_out, ignore_eos=True, temperature=1.0)
        first, got = 0.0, 0
        outputs = self._engine.generate(prompt, params)
        async with aclosing(cast(Any, outputs)) as stream:
            async for output in stream:
                if output.token_ids and not got:
                    first = time.perf_counter()
                got += len(output.token_ids)
        check_count(got, tokens_out)
        return first, time.perf_counter()

    def stages(self) -> list[StageSeconds]:
        return list(self._engine.stats.stages)

    async def close(self) -> None:
        await self._engine.close()


class Remote(Target):
    """`/v1/completions` at an address, streaming; tokens are counted by its usage chunk.

    The first token counts as seen with the first chunk, which a server that has a tokenizer may
    hold back until a character is whole.
    """

    def __init__(self, client: Any, model: str) -> None:
        self._client = client
        self._model = model

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
            return cls(client, listed.json()["data"][0]["id"])
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            await client.aclose()
            raise ConfigError(
                f"No model answers at {base}/v1/models ({error}); give the address of a running "
                "server with --url.",
                "--url",
            ) from error

    async def run(self, prompt: list[int], tokens_out: int) -> tuple[float, float]:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens_out,
            "temperature": 1.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, got = 0.0, 0
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")[:300]
                raise BenchError(f"The server answered {response.status_code}: {text}.")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = msgspec.json.decode(line[5:])
                if "error" in event:
                    raise BenchError(f"The server failed: {event['error'].get('message')}")
                if event["choices"] and not first:
                    first = time.perf_counter()
                if event.get("usage"):
                    got = event["usage"]["completion_tokens"]
        check_count(got, tokens_out)
        return first, time.perf_counter()

    async def close(self) -> None:
        await self._client.aclose()
