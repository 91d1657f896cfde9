"""An answer in progress: its text so far and everyone who is reading along."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

PING_SECONDS = 10.0


class Answer:
    """Grows while the model writes. Readers may come and go; each sees the whole answer.

    A reader keeps its own place in the text, so one that is slow or late gets what it has missed
    as one delta, and no queue can overflow.
    """

    def __init__(self, message_id: int) -> None:
        self.message_id = message_id
        self.text = ""
        self.passages: dict[str, Any] | None = None
        self.end: tuple[str, dict[str, Any]] | None = None  # ("done" | "error", data)
        self._changed = asyncio.Event()

    def show_passages(self, passages: list[dict[str, Any]], left_out: dict[str, int]) -> None:
        self.passages = {
            "message_id": self.message_id,
            "passages": passages,
            "left_out": left_out,
        }
        self._wake()

    def write(self, text: str) -> None:
        self.text += text
        self._wake()

    def close(self, event: str, data: dict[str, Any]) -> None:
        self.end = (event, data)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events from the beginning of the answer to its end."""
        place, told = 0, False
        while True:
            changed = self._changed
            if not told and self.passages is not None:
                told = True
                yield event("passages", self.passages)
            if len(self.text) > place:
                delta, place = self.text[place:], len(self.text)
                yield event("delta", {"text": delta})
            elif self.end is not None:
                yield event(*self.end)
                return
            elif not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), PING_SECONDS)
                except TimeoutError:
                    yield b": ping\n\n"


def event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
