"""Chat messages of a request, as the chat template wants them."""

from __future__ import annotations

from typing import Any

import msgspec

from serving.api.body import wrong_type
from serving.errors import InvalidRequestError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Check the field `messages`; content parts are joined by a line break.

    Raises InvalidRequestError naming the message, such as `messages[2].content`.
    """
    if value is None:
        raise InvalidRequestError("messages is missing.", "messages", code="missing_field")
    if not isinstance(value, list):
        raise wrong_type("messages", "a list of messages", value)
    if not value:
        raise InvalidRequestError("messages is empty; send at least one message.", "messages")
    return [_message(f"messages[{i}]", item) for i, item in enumerate(value)]


def _message(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise wrong_type(where, "an object with role and content", item)
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = f"not {role[:40]!r}" if isinstance(role, str) else "and it is no string"
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(_ROLES)}, {shown}.", f"{where}.role"
        )
    message: dict[str, Any] = {"role": _ROLES[role]}
    calls = item.get("tool_calls")
    if role == "assistant" and calls:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    content = item.get("content")
    if content is None:
        if role != "assistant":
            raise InvalidRequestError(
                f"{where}.content is missing.", f"{where}.content", code="missing_field"
            )
        content = ""
    message["content"] = _content(f"{where}.content", content)
    if role == "assistant":
        # Both spellings are in use; templates that show earlier reasoning read the first.
        for name in ("reasoning_content", "reasoning"):
            if isinstance(item.get(name), str):
                message["reasoning_content"] = item[name]
                break
        if item.get("audio") is not None:
            raise _text_only(f"{where}.audio", "audio")
    for name in ("name", "tool_call_id"):
        if item.get(name) is not None:
            if not isinstance(item[name], str):
                raise wrong_type(f"{where}.{name}", "a string", item[name])
            message[name] = item[name]
    return message


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of text parts", content)
    texts = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise wrong_type(here, "a text part", part)
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise _text_only(here, kind if isinstance(kind, str) else "unknown")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise wrong_type(f"{here}.text", "a string", text)
        texts.append(text)
    return "\n".join(texts)


def _text_only(where: str, kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where} is of type {kind[:40]!r}, but this model reads text only; send text parts.",
        where,
        code="unsupported_content",
    )


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Earlier tool calls; arguments become objects, as templates expect them."""
    if not isinstance(calls, list):
        raise wrong_type(where, "a list of tool calls", calls)
    found = []
    for i, call in enumerate(calls):
        here = f"{where}[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(f"{here} must hold a function with its name.", here)
        arguments = function.get("arguments", "")
        if isinstance(arguments, str) and arguments:
            try:
                arguments = msgspec.json.decode(arguments)
            except (msgspec.DecodeError, RecursionError):
                arguments = function["arguments"]  # as the model wrote it, valid or not
        identity = call.get("id")
        found.append(
            {
                "id": identity if isinstance(identity, str) else "",
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return found
