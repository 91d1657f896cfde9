"""One engine behind one HTTP server, from start to the last clean-up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.api.logs import log
from serving.config.engine import EngineConfig
from serving.config.model import ModelConfig
from serving.errors import ConfigError, EngineDeadError, LecternError

if TYPE_CHECKING:
    from serving.api.classes import Targets
    from serving.api.service import ModelService
    from serving.tokenizer import Tokenizer

#: Seconds that open answers have to finish after SIGTERM, before they are ended.
GRACE_SECONDS = 3.0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError when there cannot be one."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, not {port}.", "--port")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # The protocol is named so that asyncio switches off Nagle's delay on connections.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(
            f"--host {host} is no address that can be listened on ({error.strerror}); use "
            "127.0.0.1 for this machine only.",
            "--host",
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # At once: two sockets may share an address until one of them listens.
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is in use; stop the program that has it, or choose "
                "another port with --port.",
                "--port",
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"Port {port} may not be used by this account; choose one above 1023 with --port.",
                "--port",
            ) from error
        raise ConfigError(
            f"--host {host} is no address of this machine ({error.strerror}).", "--host"
        ) from error
    return listening


def run(config: EngineConfig, listening: socket.socket, classes: Mapping[str, Targets]) -> None:
    """Serve until SIGTERM or SIGINT. `classes` are those that a request may name.

    Raises ConfigError or ModelError when the engine cannot start, EngineDeadError when it died
    and could not be restarted.
    """
    import uvloop

    model = ModelConfig.from_folder(config.model)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, model.vocab_size, listening, classes))


async def _serve(
    config: EngineConfig,
    vocab_size: int,
    listening: socket.socket,
    classes: Mapping[str, Targets],
) -> None:
    from serving.engine import Engine

    began = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The engine's processes load weights while this one imports the rest.
    engine = asyncio.create_task(Engine.start(config, _progress))
    try:
        tokenizer = await asyncio.to_thread(_load_tokenizer, config.model)
        service = _make_service(config, vocab_size, tokenizer, engine, stop, classes)
    except BaseException:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        raise
    await _serve_http(service, listening, stop, began)


async def _serve_http(
    service: ModelService, listening: socket.socket, stop: asyncio.Event, began: float
) -> None:
    http_server = _http_server(service)
    http = asyncio.create_task(http_server.serve(sockets=[listening]))
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping, http}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            host, port = listening.getsockname()[:2]
            log(
                logging.INFO,
                "ready",
                model=service.model.name,
                url=f"http://{f'[{host}]' if ':' in host else host}:{port}/v1",
                max_model_len=service.engine.max_model_len,
                seconds=round(time.monotonic() - began, 1),
            )
            await asyncio.wait({stopping, http}, return_when=asyncio.FIRST_COMPLETED)
        if service.failure:
            raise EngineDeadError(
                f"The engine died and could not be started again: {service.failure}"
            )
    finally:
        if stop.is_set():
            log(logging.INFO, "stopping")
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        http_server.should_exit = True
        await asyncio.wait({http}, timeout=GRACE_SECONDS)
        await service.close()
        await asyncio.gather(http, return_exceptions=True)


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    # Also what the HTTP side needs: it is slow to import and wanted next.
    import serving.api.app
    from serving.tokenizer import Tokenizer

    assert serving.api.app is not None
    return Tokenizer.from_folder(folder)


def _make_service(
    config: EngineConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    engine: asyncio.Task[Any],
    stop: asyncio.Event,
    classes: Mapping[str, Targets],
) -> ModelService:
    from prometheus_client import CollectorRegistry

    from monitoring.metrics import EngineMetrics
    from serving.api.service import ModelService, ServedModel
    from serving.demo_model.make import read_marker

    untrained = config.load_format == "dummy" or bool(read_marker(config.model).get("untrained"))
    if tokenizer is None:
        log(logging.WARNING, "no tokenizer files: only prompts of token ids can be served")
    model = ServedModel(config.name, vocab_size, tokenizer, untrained, int(time.time()))

    async def started() -> Any:
        return await engine

    return ModelService(
        model,
        started,
        EngineMetrics(CollectorRegistry(), config.name),
        on_failure=lambda _: stop.set(),
        classes=classes,
    )


def _http_server(service: ModelService) -> Any:
    import uvicorn

    from serving.api.app import create_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            # Signals are the caller's, which has more to end than this server.
            yield

    return Server(
        uvicorn.Config(
            create_app(service),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
        )
    )


def _progress(text: str) -> None:
    log(logging.INFO, text)


def exit_code(error: LecternError) -> int:
    """1 for a crash, 2 for something the reader can put right."""
    return 1 if isinstance(error, EngineDeadError) else 2
