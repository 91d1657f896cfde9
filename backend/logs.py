"""Structured logs on stderr, JSON or (on a terminal) lines; never passwords, keys, questions."""

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict

_SECRET = ("password", "token", "key", "cookie", "authorization", "secret", "content")


def _hide(_: Any, __: str, event: EventDict) -> EventDict:
    for name in event:
        if any(word in name.lower() for word in _SECRET) and name != "event":
            event[name] = "hidden"
    return event


class _Lenient:
    """A stream whose full disk or closed pipe costs the line and nothing else.

    Otherwise the line about a full disk would itself fail, in the middle of telling people.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def configure(level: int = logging.INFO) -> None:
    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hide,
    ]
    if not terminal:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lenient(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    # SQLAlchemy shows statements with their parameters; httpx2 shows URLs.
    for name in ("sqlalchemy", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
