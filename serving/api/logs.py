"""Log lines of the engine's API process: one event a line, `key=value`, on standard error.

Never a prompt, an answer or a header's value.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/+%")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} {record.levelname.lower()} "
        line += record.getMessage()
        fields: dict[str, Any] = getattr(record, "fields", {})
        for name, value in fields.items():
            line += f" {name}={_shown(value)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return json.dumps(text, ensure_ascii=False)


def set_up_logs(level: int = logging.INFO) -> None:
    """Send the log of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger("lectern")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
    server = logging.getLogger("uvicorn.error")
    server.handlers = [handler]
    server.setLevel(logging.WARNING)
    server.propagate = False


def log(level: int, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Write one line; `event` is a fixed sentence, what varies goes into `fields`."""
    logger = logging.getLogger("lectern.engine")
    logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)
