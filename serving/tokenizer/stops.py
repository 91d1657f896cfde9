"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Looks for the first stop string to be completed, whatever the pieces are cut like.

    The match is the one that ends first; of two that end together, the longer one. Both rules
    speak of the text alone, so a stream and a whole answer are cut at the same character.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._firsts = tuple({text[0] for text in self._stop})
        self._longest = max((len(text) for text in self._stop), default=0)
        self.held = ""
        self.matched: str | None = None

    def push(self, piece: str, *, may_stop: bool = True) -> str:
        """Return the text that is safe to show; `held` keeps what could begin a stop string.

        After a match `matched` is set, nothing is held, and the text before the match is returned.
        With `may_stop` false (the answer is still shorter than `min_tokens`) a completed stop
        string is ordinary text.
        """
        buffer = self.held + piece
        if may_stop:
            best: tuple[int, int] | None = None
            for text in self._stop:
                start = buffer.find(text)
                if start >= 0:
                    found = (start + len(text), start)
                    if best is None or found < best:
                        best = found
                        self.matched = text
            if best is not None:
                self.held = ""
                return buffer[: best[1]]
        cut = self._first_possible_start(buffer)
        self.held = buffer[cut:]
        return buffer[:cut]

    def _first_possible_start(self, buffer: str) -> int:
        """Index of the longest suffix of `buffer` that is a proper prefix of a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._firsts:
                size = len(buffer) - start
                for text in self._stop:
                    if len(text) > size and text.startswith(buffer[start:]):
                        return start
        return len(buffer)
