"""Reading a request body: JSON, its size, and each field with its type."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.requests import Request

from serving.api.errors import ApiError
from serving.errors import InvalidRequestError

#: Bytes of a request body. A prompt of a million tokens fits.
MAX_BODY = 16 << 20
_MAX_INT = 1 << 64


async def read_object(request: Request) -> Body:
    """The JSON object in a request body. Raises ApiError or InvalidRequestError."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind.lower() != "application/json" and not kind.lower().endswith("+json"):
        raise ApiError(415, f"Send the body as application/json, not as {kind[:80] or 'nothing'}.")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(413, f"The body is larger than {MAX_BODY >> 20} MiB.")
        parts.append(part)
    try:
        found = msgspec.json.decode(b"".join(parts))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}.", code="invalid_json"
        ) from error
    if not isinstance(found, dict):
        raise InvalidRequestError(
            f"The body must be a JSON object, not {_name(found)}.", code="invalid_type"
        )
    return Body(found)


class Body:
    """Fields of a JSON object. A null field counts as absent.

    Every getter raises InvalidRequestError that names the field when its type is wrong.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def has(self, name: str) -> bool:
        return name in self.fields

    def raw(self, name: str) -> Any:
        return self.fields.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise wrong_type(name, "true or false", value)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, "a number", value)
        if (isinstance(value, int) and abs(value) >= _MAX_INT) or not math.isfinite(value):
            raise InvalidRequestError(f"{name} is far out of its range.", name)
        return float(value)

    def integer(self, name: str) -> int | None:
        value = self.fields.get(name)
        return None if value is None else check_integer(name, value)

    def integers(self, name: str) -> list[int]:
        value = self.fields.get(name, [])
        if not isinstance(value, list):
            raise wrong_type(name, "a list of integers", value)
        return check_integers(name, value)

    def texts(self, name: str) -> list[str]:
        """A string, or a list of strings."""
        value = self.fields.get(name, [])
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise wrong_type(name, "a string or a list of strings", value)
        for item in value:
            if not isinstance(item, str):
                raise wrong_type(name, "a list of strings", item, part=True)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.fields.get(name, {})
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        return value


def check_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    if abs(value) > _MAX_INT:
        raise InvalidRequestError(f"{name} is far out of its range.", name)
    return value


def check_integers(name: str, values: list[Any]) -> list[int]:
    for value in values:
        if type(value) is not int:
            raise wrong_type(name, "a list of integers", value, part=True)
        if abs(value) > _MAX_INT:
            raise InvalidRequestError(f"{name} holds a number far out of its range.", name)
    return values


def wrong_type(name: str, wanted: str, value: Any, *, part: bool = False) -> InvalidRequestError:
    how = f"but it holds {_name(value)}" if part else f"not {_name(value)}"
    return InvalidRequestError(f"{name} must be {wanted}, {how}.", name, code="invalid_type")


def _name(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "a list"),
    ):
        if isinstance(value, kind):
            return name
    return "an object"
