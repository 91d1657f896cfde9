"""The real application over a fake engine: on a real socket in a thread, or called directly."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import httpx2
import uvicorn
from prometheus_client import CollectorRegistry

from monitoring.metrics import EngineMetrics
from serving.api.app import create_app
from serving.api.service import ModelService, ServedModel
from serving.tokenizer import Tokenizer
from tests.serving.api.fake_engine import FakeEngine

T = TypeVar("T")


def make_service(
    engine: FakeEngine, tokenizer: Tokenizer | None, vocab_size: int = 300, **options: Any
) -> ModelService:
    async def start() -> FakeEngine:
        return engine

    model = ServedModel("tiny", vocab_size, tokenizer, untrained=True, created=1_700_000_000)
    return ModelService(model, start, EngineMetrics(CollectorRegistry(), "tiny"), **options)


class Server:
    """uvicorn with one service in its own thread; `do` runs a coroutine in its loop."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int = 300, **engine: Any) -> None:
        self._listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._tokenizer = tokenizer
        self._listening.listen()  # who comes before the server is up waits for it
        self._vocab_size = vocab_size
        self._options = engine
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = FakeEngine(**self._options)
        self.service = make_service(self.engine, self._tokenizer, self._vocab_size)
        await self.service.start()
        self.engine.calls.clear()
        config = uvicorn.Config(create_app(self.service), log_config=None, lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listening]))
        self._ready.set()
        await serving
        await self.service.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def call(self, work: Callable[[], T]) -> T:
        async def run() -> T:
            return work()

        return self.do(run())

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds in the server's loop."""

        async def watch() -> None:
            while not holds():  # noqa: ASYNC110 - a test may look; the server has no such event
                await asyncio.sleep(0.005)

        self.do(asyncio.wait_for(watch(), 10))

    @cached_property
    def kept_client(self) -> httpx2.Client:
        """A client for many requests, closed with the server."""
        return self.client()

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=20)

    @contextmanager
    def running(self) -> Iterator[Server]:
        self._thread.start()
        assert self._ready.wait(20)
        try:
            yield self
        finally:
            if "kept_client" in self.__dict__:
                self.kept_client.close()
            self._uvicorn.should_exit = True
            self._thread.join(20)
            assert not self._thread.is_alive()


def events(text: str) -> list[Any]:
    """The data of server-sent events; `[DONE]` stays a string. Checks the framing."""
    assert text.endswith("\n\n")
    found: list[Any] = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def text_of(chunks: list[Any]) -> str:
    """Concatenated text of the chunks of one choice."""
    parts = []
    for chunk in chunks:
        if chunk == "[DONE]":
            continue
        for choice in chunk["choices"]:
            delta = choice.get("delta", choice)
            parts.append(delta.get("content") or delta.get("text") or "")
    return "".join(parts)
