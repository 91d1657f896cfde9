"""Serving the web application with uvicorn, on a socket that is bound before anything starts."""

from __future__ import annotations

import errno
import os
import signal
import socket
from types import FrameType
from urllib.parse import urlsplit

import uvicorn


class ServeError(Exception):
    """The server cannot be started as asked; the message says why and what to do."""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"Port {port} on {host} is in use; stop the program that has it or choose "
                "another with --port."
            ) from error
        raise ServeError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. "
            "Give another address with --host or another port with --port."
        ) from error
    listener.setblocking(False)
    return listener


def _check_url(flag: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ServeError(f"{flag} must be an http or https URL, not {url!r}.")
    return url.rstrip("/")


def _note_signal(_number: int, _frame: FrameType | None) -> None:
    """Uvicorn raises the signal that stopped it once more; by then all is done: exit with 0."""


def serve(host: str, port: int, backend_url: str, api_base_url: str | None) -> None:
    """Serve until SIGTERM or SIGINT. Raises ServeError when the port or a URL cannot be used."""
    backend_url = _check_url("--backend-url", backend_url)
    api_base_url = _check_url("--api-base-url", api_base_url or f"{backend_url}/v1")
    listener = _listen(host, port)
    # The pages' script reads its settings from the environment of this process.
    os.environ["LECTERN_BACKEND_URL"] = backend_url
    os.environ["LECTERN_API_BASE_URL"] = api_base_url

    from streamlit.web import bootstrap

    from web.app import create_app
    from web.settings import WebSettings, streamlit_options

    bootstrap.load_config_options(streamlit_options(host, port))
    app = create_app(WebSettings.from_environment())
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=64 * 1024 * 1024,
        access_log=False,
        log_level="warning",
        server_header=False,
        # Open pages hold their connection; a stop does not wait for them.
        timeout_graceful_shutdown=3,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note_signal)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
