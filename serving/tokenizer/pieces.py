"""What a single token adds to a text, for the decoders that tokenizer files name."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection
from typing import Any, Protocol

from tokenizers import Tokenizer as BackendTokenizer


class PieceSource(Protocol):
    """Turns token ids into text, one at a time, never splitting a character."""

    def push(self, token_id: int) -> str:
        """Return the text this token completes; an unfinished character waits."""

    def finish(self) -> str:
        """Return U+FFFD for a character that never was completed, else nothing."""

    @property
    def pending(self) -> bool:
        """True while bytes of an unfinished character wait."""


def byte_alphabet() -> dict[str, int]:
    """Printable stand-ins of byte-level BPE: each byte's character, as GPT-2 defined them."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


class ByteTable:
    """Bytes of each token, filled as tokens are met.

    Knows byte-level decoders (a token is a string of byte stand-ins) and SentencePiece ones
    (a mark for the space, `<0x0A>` for a byte). Any other decoder has no table.
    """

    def __init__(self, backend: BackendTokenizer, hidden: Collection[int]) -> None:
        self._backend = backend
        self._hidden = frozenset(hidden)
        self._shown: dict[int, bytes] = {}
        self._all: dict[int, bytes] = {}
        self._to_bytes, self.strips_first_space = _decoder_rules(backend)

    @property
    def known(self) -> bool:
        return self._to_bytes is not None

    def raw(self, token_id: int) -> bytes:
        """Bytes of a token, special tokens included; empty for an id without a token."""
        found = self._all.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                found = b""
            elif self._to_bytes is None:
                found = token.encode()
            else:
                found = self._to_bytes(token)
            self._all[token_id] = found
        return found

    def shown(self, token_id: int) -> bytes:
        """Bytes of a token; special tokens have none."""
        found = self._shown.get(token_id)
        if found is None:
            found = b"" if token_id in self._hidden else self.raw(token_id)
            self._shown[token_id] = found
        return found


def _decoder_rules(backend: BackendTokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    if backend.decoder is None:
        return None, False
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {part["type"]: part for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level, False
    if "Metaspace" in kinds:
        mark = kinds["Metaspace"]["replacement"]
        strips = kinds["Metaspace"].get("prepend_scheme", "always") != "never"
        return _sentence_piece(mark, "ByteFallback" in kinds), strips
    if "ByteFallback" in kinds and "Replace" in kinds:
        mark = kinds["Replace"]["pattern"].get("String", "\u2581")
        strips = kinds.get("Strip", {}).get("start", 0) > 0
        return _sentence_piece(mark, True), strips
    return None, False


_ALPHABET = byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token is written as itself
        return token.encode()


def _sentence_piece(mark: str, byte_tokens: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        if byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.replace(mark, " ").encode()

    return to_bytes


class BytePieces:
    """Pieces by way of bytes and an incremental UTF-8 decoder; invalid bytes become U+FFFD."""

    def __init__(self, table: ByteTable, *, skip_special_tokens: bool, starts_text: bool) -> None:
        self._bytes = table.shown if skip_special_tokens else table.raw
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = starts_text and table.strips_first_space

    def push(self, token_id: int) -> str:
        text = self._decoder.decode(self._bytes(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])


class WindowPieces:
    """Pieces for decoders without a byte table: decode a short window twice and compare.

    The window starts at the token before the last one shown, so that decoders which join tokens
    by their neighbours (a space before a word, none before a suffix) see the same neighbours.
    """

    #: Tokens an unfinished character may take before it is given up as U+FFFD.
    PATIENCE = 8

    def __init__(self, backend: BackendTokenizer, *, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = 0

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip)

    def _fresh(self) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(before) :]

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        fresh = self._fresh()
        waiting = len(self._window) - self._shown
        if not fresh or (fresh.endswith("\ufffd") and waiting < self.PATIENCE):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return fresh

    def finish(self) -> str:
        fresh = self._fresh()
        self._shown = len(self._window)
        return fresh

    @property
    def pending(self) -> bool:
        return len(self._window) > self._shown
