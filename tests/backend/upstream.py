"""A small OpenAI-style model server for tests, run in this process by uvicorn on a free port."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


@dataclass
class FakeUpstream:
    """What it answers can be changed while it runs; what it was asked can be looked at."""

    words: list[str] = field(default_factory=lambda: ["Hel", "lo ", "[1]", " wor", "ld"])
    delay: float = 0.0
    owned_by: str = "lectern"
    has_tokenize: bool = True
    error: tuple[int, dict[str, Any]] | None = None
    retry_after: str | None = None  # sent with `error`
    cut_after: int | None = None  # break the connection after so many words
    error_after: int | None = None  # an error event after so many words
    metrics: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    opened: int = 0
    closed_early: int = 0
    finished: int = 0
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            row = {
                "id": "demo",
                "object": "model",
                "created": 1,
                "owned_by": self.owned_by,
                "max_model_len": 2048,
                "x_lectern": {"untrained": True, "has_tokenizer": True},
            }
            return {"object": "list", "data": [row]}

        @app.get("/metrics")
        async def metrics() -> Any:
            from fastapi.responses import PlainTextResponse

            return PlainTextResponse(self.metrics)

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            if not self.has_tokenize:
                return JSONResponse({"detail": "Not Found"}, status_code=404)
            body = await request.json()
            text = body.get("prompt") or "".join(m["content"] for m in body["messages"])
            return {"count": len(text) // 4 + 1, "max_model_len": 2048, "tokens": []}

        @app.post("/v1/{path:path}")
        async def call(path: str, request: Request) -> Any:
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            self.opened += 1
            if self.error is not None:
                wait = {"Retry-After": self.retry_after} if self.retry_after else None
                return JSONResponse(self.error[1], status_code=self.error[0], headers=wait)
            if body.get("stream"):
                return StreamingResponse(self._stream(body), media_type="text/event-stream")
            return await self._whole(request)

        return app

    async def _whole(self, request: Request) -> Any:
        for _ in self.words:
            await asyncio.sleep(self.delay)
            if await request.is_disconnected():
                self.closed_early += 1
                return JSONResponse({})
        self.finished += 1
        text = "".join(self.words)
        message = {"role": "assistant", "content": text}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "demo",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        }

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        done = False
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for number, word in enumerate(self.words):
                if self.cut_after == number:
                    raise ConnectionResetError("cut on purpose")
                if self.error_after == number:
                    error = {"message": "stage died", "type": "api_error", "code": "engine_dead"}
                    yield f"data: {json.dumps({'error': error | {'param': None}})}\n\n"
                    return
                await asyncio.sleep(self.delay)
                yield _chunk({"content": word})
            yield _chunk({}, "stop")
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
                yield _chunk(None, usage=usage)
            yield "data: [DONE]\n\n"
            done = True
            self.finished += 1
        finally:
            if not done:
                self.closed_early += 1


def _chunk(
    delta: dict[str, Any] | None, finish: str | None = None, usage: dict[str, int] | None = None
) -> str:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "demo",
        "choices": choices,
    }
    if usage is not None:
        body["usage"] = usage
    return f"data: {json.dumps(body)}\n\n"


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """Run an ASGI application on a free port of this process; gives its address."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, timeout_graceful_shutdown=2, lifespan="auto"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    ready = threading.Event()
    try:
        while not server.started and thread.is_alive():
            ready.wait(0.01)
        assert server.started, "the server did not start"
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
