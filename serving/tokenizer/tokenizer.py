"""The tokenizer of a checkpoint folder: text to ids, chat messages to ids, ids to text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from serving.errors import InvalidRequestError, ModelError
from serving.tokenizer.detokenizer import Detokenizer
from serving.tokenizer.pieces import BytePieces, ByteTable, PieceSource, WindowPieces

#: Files that hold a vocabulary. Without any of them a folder has no tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")

#: Noncharacters of Unicode: legal in a string, never a letter of any text.
_SEAMS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Tokenizer:
    """Tokenizer and chat template of one model, from local files alone.

    No code of the folder is run; the template runs in the sandbox of transformers.
    """

    def __init__(self, pretrained: Any) -> None:
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = {
            token_id: token.content for token_id, token in added.items() if token.special
        }
        self._table = ByteTable(self._backend, self._special)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer | None:
        """Load the tokenizer of a folder, or return None when it has no tokenizer files.

        Raises ModelError when there are files but they cannot be used.
        """
        folder = Path(path)
        found = [name for name in VOCABULARY_FILES if (folder / name).is_file()]
        if not found:
            return None
        try:
            return cls(_load(folder, found))
        except Exception as error:
            # Whatever a damaged file makes the library raise, the reader needs the file's name.
            raise ModelError(
                f"The tokenizer in {folder} cannot be used ({', '.join(found)}: "
                f"{_first_line(error)}); download the folder again, or remove these files to "
                "serve prompts of token ids only."
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a token, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._pretrained.chat_template)

    @cached_property
    def template_text(self) -> str:
        """Source of the chat template; empty without one."""
        template = self._pretrained.chat_template
        if isinstance(template, Mapping):
            return "\n".join(str(text) for text in template.values())
        return str(template or "")

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: bounds from below how many tokens a text needs."""
        return max((len(token) for token in self._backend.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in the text become special tokens."""
        _check_text(text)
        # The batch call lets other threads run meanwhile, the single one does not.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids that begin a text. An incomplete character becomes U+FFFD."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens, starts_text=True)
        return detokenizer.feed(list(token_ids)) + detokenizer.finish()

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """Text and bytes of one token on its own, special tokens included."""
        raw = self._table.raw(token_id)
        return raw.decode("utf-8", "replace"), raw

    def detokenizer(
        self,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        starts_text: bool = False,
    ) -> Detokenizer:
        """A detokenizer for one answer; see :class:`Detokenizer` for `starts_text`."""
        pieces: PieceSource
        if self._table.known:
            pieces = BytePieces(
                self._table, skip_special_tokens=skip_special_tokens, starts_text=starts_text
            )
        else:
            pieces = WindowPieces(self._backend, skip_special_tokens=skip_special_tokens)
        return Detokenizer(pieces, stop, min_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Text of a message never becomes a special token, whatever it spells: a document that
        holds `<|im_end|>` cannot end a turn. `variables` go to the template as they are.
        Raises InvalidRequestError when there is no template or it refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "This model has no chat template; send the whole prompt to /v1/completions.",
                "messages",
                code="no_chat_template",
            )
        guarded, seam = self._guard(messages)
        text = self._render(guarded, add_generation_prompt, variables or {})
        ids: list[int] = []
        for part in text.split(seam) if seam else [text]:
            ids += self.encode(part, add_special_tokens=False)
        return ids

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        try:
            text = self._pretrained.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:
            # A template is a program of its own: it raises whatever the messages lead it into.
            raise InvalidRequestError(
                "The chat template of this model could not be applied to these messages: "
                f"{_first_line(error)}.".replace("..", "."),
                "messages",
            ) from error
        return str(text)

    def _guard(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Cut special tokens that stand in message text by a seam, at which ids are joined."""
        specials = [text for text in self._special.values() if len(text) > 1]
        if not any(_mentions(message, specials) for message in messages):
            return [dict(message) for message in messages], ""
        for seam in _SEAMS:
            if not any(_mentions(message, [seam]) for message in messages):
                break
        else:
            raise InvalidRequestError(
                "The messages hold too many different Unicode noncharacters.", "messages"
            )

        def cut(value: Any) -> Any:
            if isinstance(value, str):
                for special in specials:
                    value = value.replace(special, special[0] + seam + special[1:])
                return value
            if isinstance(value, Mapping):
                return {key: cut(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [cut(inner) for inner in value]
            return value

        return [
            {key: inner if key == "role" else cut(inner) for key, inner in message.items()}
            for message in messages
        ], seam


def _mentions(value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(text in value for text in texts)
    if isinstance(value, Mapping):
        return any(_mentions(inner, texts) for inner in value.values())
    if isinstance(value, list):
        return any(_mentions(inner, texts) for inner in value)
    return False


def _load(folder: Path, found: list[str]) -> Any:
    if "tokenizer.json" in found:
        # The class itself, not AutoTokenizer: it needs no torch, and it takes tokenizer.json as
        # it is, where a class named in tokenizer_config.json may rebuild it otherwise.
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        config = folder / "tokenizer_config.json"
        if config.is_file():
            json.loads(config.read_bytes())
        return TokenizersBackend.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ValueError("no tokenizer.json, and it cannot be made from the other files")
    return loaded


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "The text holds half of a surrogate pair, which is no character; send valid Unicode.",
            "prompt",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
