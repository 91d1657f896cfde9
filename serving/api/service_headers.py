"""The X-Lectern headers of a request: whose it is and how soon it is wanted.

    X-Lectern-Tenant     opaque name of whoever pays; service is shared out fairly between tenants
    X-Lectern-Class      one of the engine's classes; standard without it
    X-Lectern-TTFT-Ms    milliseconds to the first token, or none for best effort
    X-Lectern-TPOT-Ms    milliseconds for each token after it, or none
    X-Lectern-Program    name of an agent's run; its calls age together, within one tenant
    X-Lectern-Priority   -1000 to 1000, smaller is sooner; counts under --order priority alone

Of a class and a target both given, the weaker counts, the larger of the two: so a gateway names the
class of a key and passes on what its client asks for without reading it. Whoever names no class has
the targets that the headers say, and those of `standard` for what they leave out.

The engine believes these headers. Clients reach it through a gateway that sets them itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from serving.api.classes import STANDARD, Targets
from serving.config.service import Service, TtftTarget
from serving.errors import InvalidRequestError

_CLASS = "X-Lectern-Class"
_PRIORITY = "X-Lectern-Priority"
_TEXT = re.compile(r"[\x20-\x7e]{1,128}")
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,9})?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,4}", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """What the headers ask for. `least_ttft` seconds bound the class's target from below."""

    service: Service
    least_ttft: float = 0.0

    def of(self, prompt_tokens: int) -> Service:
        """The same for one prompt, whose length a class's target may count."""
        target = self.service.ttft
        if target is None or not self.least_ttft:
            return self.service
        seconds = max(self.least_ttft, target.of(prompt_tokens, 0.0))
        weaker = TtftTarget(seconds, 0.0, target.times_own)
        return msgspec.structs.replace(self.service, ttft=weaker)


def read_wanted(headers: Mapping[str, str], classes: Mapping[str, Targets]) -> Wanted:
    """Raises InvalidRequestError, which names the header."""
    named = headers.get(_CLASS, "")
    targets = classes.get(named or STANDARD)
    if targets is None:
        raise InvalidRequestError(
            f"There is no class {named[:64]!r}; this server has {', '.join(sorted(classes))}.",
            _CLASS,
        )
    ttft, tpot, least = targets.ttft, targets.tpot, 0.0
    given, seconds = _seconds(headers, "X-Lectern-TTFT-Ms")
    if given:
        if seconds is None:
            ttft = None
        elif named:
            least = seconds
        else:
            ttft = TtftTarget(seconds)
    given, seconds = _seconds(headers, "X-Lectern-TPOT-Ms")
    if given:
        tpot = _weaker(tpot, seconds) if named else seconds
    service = Service(
        tenant=_text(headers, "X-Lectern-Tenant"),
        program=_text(headers, "X-Lectern-Program"),
        priority=_priority(headers),
        ttft=ttft,
        tpot=tpot,
    )
    return Wanted(service, least)


def _weaker(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _text(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "")
    if value and not _TEXT.fullmatch(value):
        raise InvalidRequestError(f"{name} must have at most 128 printable ASCII characters.", name)
    return value


def _seconds(headers: Mapping[str, str], name: str) -> tuple[bool, float | None]:
    """(whether it is there, seconds); None means none."""
    value = headers.get(name, "")
    if not value:
        return False, None
    if value == "none":
        return True, None
    if not _NUMBER.fullmatch(value) or not float(value):
        raise InvalidRequestError(
            f"{name} must be a number of milliseconds above 0 such as 1500, or none.", name
        )
    return True, float(value) / 1000


def _priority(headers: Mapping[str, str]) -> int:
    value = headers.get(_PRIORITY, "")
    if not value:
        return 0
    if not _INTEGER.fullmatch(value) or abs(int(value)) > 1000:
        raise InvalidRequestError(
            f"{_PRIORITY} must be a whole number from -1000 to 1000.", _PRIORITY
        )
    return int(value)
