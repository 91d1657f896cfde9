"""Typed reading of a JSON object's fields, with errors that name file and field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.errors import ModelError

__all__ = ["Fields"]


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object; `where` names it in errors. None stands for a missing value.

    A default of None makes a field required.
    """

    values: Mapping[str, Any]
    where: str

    def _wrong(self, name: str, wanted: str) -> ModelError:
        return ModelError(f"{self.where}: {name} must be {wanted}, not {self.values[name]!r}.")

    def _missing(self, name: str) -> ModelError:
        return ModelError(f"{self.where}: {name} is missing; the folder may be incomplete.")

    def number(self, name: str, default: float | None) -> float:
        """A finite number."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if value != value or value in (float("inf"), float("-inf")):
            raise self._wrong(name, "a finite number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None."""
        return None if self.values.get(name) is None else self.number(name, None)

    def whole(self, name: str, default: int | None) -> int:
        """A whole number (8192 and 8192.0 alike)."""
        value = self.number(name, None if default is None else float(default))
        if value != int(value):
            raise self._wrong(name, "a whole number")
        return int(value)

    def count(self, name: str, default: int | None) -> int:
        """A whole number of at least 1."""
        value = self.whole(name, default)
        if value < 1:
            raise self._wrong(name, "at least 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def token_ids(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A token id or a list of them; null means none, a missing field means the default."""
        if name not in self.values:
            return default
        value = self.values[name]
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ids):
            raise self._wrong(name, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))
