"""Starts the fake backend in this process and the web application as its own process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import uvicorn

from tests.web.fake_backend import FakeBackend


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_backend(backend: FakeBackend) -> Iterator[str]:
    """Serve `backend` on a free port in a thread; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(backend.app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_until_up(url: str, process: subprocess.Popen[bytes], seconds: float = 40) -> None:
    """Wait until `url` answers; fails when the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the web application ended with code {process.returncode}")
        try:
            httpx2.get(url, timeout=2, trust_env=False)
            return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer in {seconds} s")


@contextmanager
def running_pages(backend_url: str, log: Path) -> Iterator[str]:
    """Start `python -m web` on a free port; yields its URL. Its output goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", "web", "--port", str(port), "--backend-url", backend_url]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HOME": str(log.parent)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url + "/login", process)
            yield url
        finally:
            process.terminate()
            process.wait(15)
