"""Token ids of one answer to text that is safe to show at once."""

from __future__ import annotations

from collections.abc import Sequence

from serving.tokenizer.pieces import PieceSource
from serving.tokenizer.stops import StopFinder


class Detokenizer:
    """Streams the text of one token sequence.

    Whole answers and streams use the same object, so their texts are the same. The concatenation
    of everything returned never holds a part of a stop string that was matched, nor a split
    character: bytes of an unfinished character wait for the next token, and :meth:`finish` turns
    what is left of them into U+FFFD.

    `starts_text` tells that the tokens begin a text of their own (a chat answer) instead of
    carrying on a prompt; tokenizers that mark the first word with a space then lose that space.
    """

    def __init__(self, pieces: PieceSource, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._pieces = pieces
        self._finder = StopFinder(stop) if any(stop) else None
        self._min_tokens = min_tokens
        #: Tokens fed, up to and including the one that completed a stop string.
        self.num_tokens = 0
        #: Characters decoded so far, shown or held.
        self.decoded_chars = 0
        #: Characters returned so far.
        self.shown_chars = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, or None."""
        return None if self._finder is None else self._finder.matched

    @property
    def pending(self) -> bool:
        """True while bytes of an unfinished character wait."""
        return self._pieces.pending

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that became safe to show. After a stop string nothing more comes."""
        out = ""
        for token_id in token_ids:
            if self._finder is not None and self._finder.matched is not None:
                break
            self.num_tokens += 1
            text = self._pieces.push(token_id)
            if text:
                out += self._show(text)
        return out

    def count_hidden(self) -> None:
        """Count a token that ends the answer and has no text (the end or a stop token)."""
        self.num_tokens += 1

    def finish(self) -> str:
        """Return what was still held back; the answer has ended."""
        if self._finder is None:
            return self._show(self._pieces.finish())
        if self._finder.matched is not None:
            return ""
        out = self._show(self._pieces.finish())
        if self._finder.matched is None:
            rest, self._finder.held = self._finder.held, ""
            self.shown_chars += len(rest)
            out += rest
        return out

    def _show(self, text: str) -> str:
        self.decoded_chars += len(text)
        if self._finder is not None:
            text = self._finder.push(text, may_stop=self.num_tokens >= self._min_tokens)
        self.shown_chars += len(text)
        return text
