"""Reading a server-sent event stream while it is relayed, at little cost a chunk."""

from typing import Any

import msgspec

_MAX_EVENT = 4 * 1024 * 1024
# Inside JSON strings a quote is escaped, so these bytes can only be the fields themselves.
_USAGE = (b'"usage":{', b'"usage": {')
_ERROR = (b'data: {"error"', b'data:{"error"')
_DONE = b"data: [DONE]"


class EventSplitter:
    """Cuts bytes into whole events; what is not yet whole stays behind."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Events without their closing blank line. Raises ValueError on an endless event."""
        data = self.rest + chunk if self.rest else chunk
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self.rest = events.pop()
        if len(self.rest) > _MAX_EVENT:
            raise ValueError("the model server sent an event without an end")
        return [event for event in events if event]


def event_json(event: bytes) -> dict[str, Any] | None:
    """The object of a data event; None for comments, [DONE] and anything else."""
    lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
    if not lines or lines[0] == b"[DONE]":
        return None
    try:
        decoded = msgspec.json.decode(b"\n".join(lines))
    except msgspec.DecodeError:
        return None
    return decoded if isinstance(decoded, dict) else None


class StreamTap:
    """Passes a stream on and keeps its accounts.

    The usage event is read and, unless the client asked for it, taken out. Every other event goes
    on byte for byte; only events that can hold usage are decoded.
    """

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._splitter = EventSplitter()
        self.usage: dict[str, Any] | None = None
        self.events = 0  # data events with content: a lower bound of the tokens streamed
        self.done = False
        self.failed = False

    @property
    def open_event(self) -> bool:
        """Whether the stream stands in the middle of an event."""
        return bool(self._splitter.rest)

    def feed(self, chunk: bytes) -> bytes:
        whole = not self._splitter.rest and chunk.endswith(b"\n\n")
        plain = whole and not any(mark in chunk for mark in _USAGE) and b"\r" not in chunk
        if plain:
            self._note(chunk)
            return chunk
        kept = []
        for event in self._splitter.feed(chunk):
            self._note(event)
            if self._keep(event):
                kept.append(event + b"\n\n")
        return b"".join(kept)

    def _note(self, data: bytes) -> None:
        # JSON holds no bare newline, so only real lines are counted.
        self.events += data.count(b"\ndata: {") + data.startswith(b"data: {")
        if _DONE in data and (data.startswith(_DONE) or b"\n" + _DONE in data):
            self.done = True
        if any(mark in data for mark in _ERROR):
            self.failed = True

    def _keep(self, event: bytes) -> bool:
        if not any(mark in event for mark in _USAGE):
            return True
        decoded = event_json(event)
        if decoded is None or not isinstance(decoded.get("usage"), dict):
            return True
        self.usage = decoded["usage"]
        if decoded.get("choices"):
            return True
        self.events -= 1
        return self._keep_usage


def encode_event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
