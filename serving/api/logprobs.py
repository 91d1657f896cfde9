"""Log probabilities in the two shapes of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.api.choice import ShownToken
from serving.tokenizer import Tokenizer

#: JSON has no infinity: what a filter or a ban made impossible is shown as this.
LOWEST = -9999.0


def _text(tokenizer: Tokenizer | None, token_id: int) -> tuple[str, bytes | None]:
    if tokenizer is None:
        return f"token_id:{token_id}", None
    return tokenizer.token_text(token_id)


def _entry(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = _text(tokenizer, token_id)
    return {
        "token": text,
        "logprob": max(logprob, LOWEST),
        "bytes": None if raw is None else list(raw),
    }


def chat_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[ShownToken], top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice; `top` alternatives a token."""
    content = []
    for token in tokens:
        one = token.logprobs
        entry = _entry(tokenizer, one.token_id, one.logprob)
        entry["top_logprobs"] = [
            _entry(tokenizer, token_id, logprob)
            for token_id, logprob in zip(one.top_ids[:top], one.top_logprobs[:top], strict=True)
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[ShownToken], top: int
) -> dict[str, Any]:
    """`logprobs` of a completion choice, `text_offset` counted from the answer's beginning."""
    tops = []
    for token in tokens:
        one = token.logprobs
        best = {
            _text(tokenizer, token_id)[0]: max(logprob, LOWEST)
            for token_id, logprob in zip(one.top_ids[:top], one.top_logprobs[:top], strict=True)
        }
        best.setdefault(_text(tokenizer, one.token_id)[0], max(one.logprob, LOWEST))
        tops.append(best)
    return {
        "tokens": [_text(tokenizer, token.logprobs.token_id)[0] for token in tokens],
        "token_logprobs": [max(token.logprobs.logprob, LOWEST) for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }
