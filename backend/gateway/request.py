"""What a client sent to a metered route: checked, cleaned, priced."""

from dataclasses import dataclass
from typing import Any

import msgspec

from backend.errors import ApiError
from backend.upstream import ModelInfo

# Chosen by the platform, never by a client: the salt keeps people out of each other's cache.
_PLATFORM_FIELDS = ("cache_salt",)
_DEFAULT_ANSWER = 4096


@dataclass(frozen=True)
class ModelRequest:
    body: bytes  # what goes upstream
    model: str
    stream: bool
    wants_usage: bool
    prompt_bound: int  # upper bound of prompt tokens
    prompt_guess: int  # used for the ledger when the model server gives no count
    answer_bound: int  # upper bound of tokens generated

    @property
    def reservation(self) -> int:
        return self.prompt_bound + self.answer_bound


def read_request(
    raw: bytes, model: ModelInfo | None, context_tokens: int, salt: str = ""
) -> ModelRequest:
    """Decode and prepare a request; raises ApiError 400 with the field at fault.

    `salt` starts the prefix-cache hash of an engine that knows salts, so that nobody can find out
    from `cached_tokens` what others have asked.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad("The body is not valid JSON.", "invalid_json") from error
    if not isinstance(body, dict):
        raise _bad("The body must be a JSON object.", "invalid_json")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise _bad("stream must be true or false.", param="stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _bad("stream_options must be an object.", param="stream_options")
    wants_usage = bool((options or {}).get("include_usage"))
    for field in _PLATFORM_FIELDS:
        body.pop(field, None)
    if model is not None and model.is_lectern and salt:
        body["cache_salt"] = salt
    if stream:
        body["stream_options"] = {**(options or {}), "include_usage": True}
    context = model.max_model_len if model and model.max_model_len else None
    bound, guess = _prompt_size(body)
    prompts = bound_of_prompts(body)
    if context is not None:
        bound, guess = min(bound, context * prompts), min(guess, context * prompts)
    answers = _count(body, "n", 1) * prompts
    answer = _answer_limit(body, context or context_tokens)
    return ModelRequest(
        body=msgspec.json.encode(body),
        model=str(body.get("model") or ""),
        stream=stream,
        wants_usage=wants_usage,
        prompt_bound=bound,
        prompt_guess=guess,
        answer_bound=answer * answers,
    )


def _bad(message: str, code: str = "invalid_value", param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param=param)


def _count(body: dict[str, Any], field: str, default: int) -> int:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value > 10**9:
        raise _bad(f"{field} must be a whole number that is not negative.", param=field)
    return value


def _answer_limit(body: dict[str, Any], context: int) -> int:
    """The largest limit named: which of several a model server heeds is its own affair."""
    fields = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    named = [_count(body, field, 0) for field in fields if body.get(field) is not None]
    return min(max(named), max(context, _DEFAULT_ANSWER)) if named else context


def bound_of_prompts(body: dict[str, Any]) -> int:
    """How many prompts a completion asks at once."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return len(prompt)
    return 1


def _prompt_size(body: dict[str, Any]) -> tuple[int, int]:
    """(bound, guess) in tokens: a token covers at least one byte, about three on average."""
    ids, size, messages = 0, 0, 0
    found = [body.get(key) for key in ("messages", "prompt", "input", "tools", "instructions")]
    while found:
        value = found.pop()
        if isinstance(value, str):
            size += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            messages += 1
            found.extend(value.values())
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                ids += len(value)
            else:
                found.extend(value)
    return ids + size + messages * 8 + 16, ids + (size + 2) // 3 + messages * 4
