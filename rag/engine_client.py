"""A model behind an OpenAI-style API: one that runs already, or an engine started for the time."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from rag.prompt import Message

_SECONDS = 300.0
_READY = re.compile(r" ready .*\burl=(http\S+)/v1\b")


class EngineError(RuntimeError):
    """An engine that did not start or refused a request; one sentence."""


class EngineClient:
    """Asks the first model that `url` lists."""

    def __init__(self, url: str) -> None:
        self._client = httpx2.Client(base_url=url, timeout=_SECONDS)
        row = self._get("/v1/models")["data"][0]
        self.model = str(row["id"])
        self.context_tokens = int(row.get("max_model_len") or 4096)

    def count(self, messages: list[Message]) -> int:
        """Return the length of a chat in tokens."""
        body = {"model": self.model, "messages": messages}
        return int(self._post("/tokenize", body)["count"])

    def answer(self, messages: list[Message], max_tokens: int) -> str:
        """Return a greedy answer."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def close(self) -> None:
        self._client.close()

    def _get(self, path: str) -> Any:
        return self._read(self._client.get(path))

    def _post(self, path: str, body: object) -> Any:
        return self._read(self._client.post(path, json=body))

    def _read(self, response: httpx2.Response) -> Any:
        if response.status_code != 200:
            raise EngineError(
                f"The engine answered {response.status_code} to {response.request.url.path}:"
                f" {response.text[:300]}"
            )
        return response.json()


@contextmanager
def running_engine(model: str, url: str | None = None) -> Iterator[EngineClient]:
    """Yield a client of the engine at `url`, or of one started for `model` and ended afterwards.

    Raises:
        EngineError: the engine did not start; its own words are on stderr.
    """
    process: subprocess.Popen[str] | None = None
    if url is None:
        if threading.current_thread() is threading.main_thread():
            # A command that is told to end takes its engine with it.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve", model, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    client = None
    try:
        if process is not None:
            url = _ready_url(process)
        assert url is not None
        client = EngineClient(url)
        yield client
    except httpx2.HTTPError as error:
        raise EngineError(f"The engine at {url} cannot be reached: {error}.") from error
    finally:
        if client is not None:
            client.close()
        if process is not None:
            process.terminate()
            process.wait()


def _ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        ready = _READY.search(line)
        if ready:
            # Its log goes on; a full pipe would stop it.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return ready[1]
    process.wait()
    sys.stderr.writelines(said[-20:])
    raise EngineError(f"The engine ended with code {process.returncode} before it was ready.")
