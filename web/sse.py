"""Server-sent events from lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event of an answer: `name` is passages, delta, done, error or ping."""

    name: str
    data: dict[str, Any]


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events in `lines` (without their line ends); a comment is an event named `ping`.

    Follows the event stream format of the HTML standard as far as a backend of ours writes it:
    several `data` lines are joined by a line feed, unknown fields are skipped, an event that the
    end of the stream cuts is dropped. Raises ValueError when the data is not a JSON object.
    """
    name = "message"
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                value = json.loads("\n".join(data))
                if not isinstance(value, dict):
                    raise ValueError("the data of an event is not a JSON object")
                yield Event(name, value)
            name, data = "message", []
        elif line.startswith(":"):
            yield Event("ping", {})
        else:
            field, _, value_text = line.partition(":")
            value_text = value_text.removeprefix(" ")
            if field == "event":
                name = value_text
            elif field == "data":
                data.append(value_text)
