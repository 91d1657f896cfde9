"""How soon a request is wanted and whose it is.

A target of the time to first token (TTFT) is written as one of

    2                 seconds
    2+0.001*tokens    and seconds for each token of the prompt
    max(2,5*own)      2 seconds, or 5 times the predicted time of its own uncached prefill if longer
    none              best effort
"""

from __future__ import annotations

import math
import re

import msgspec

from serving.errors import ConfigError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"{_NUMBER}(?:\+{_NUMBER}\*tokens)?", re.ASCII)
_OWN = re.compile(rf"max\({_NUMBER}(?:\+{_NUMBER}\*tokens)?,{_NUMBER}\*own\)", re.ASCII)


class TtftTarget(msgspec.Struct, frozen=True, array_like=True):
    """max(seconds + per_token * prompt tokens, times_own * own prefill), in seconds."""

    seconds: float
    per_token: float = 0.0
    times_own: float = 0.0

    def of(self, tokens: int, own: float) -> float:
        """Seconds for a prompt of so many tokens whose uncached prefill takes `own` seconds."""
        return max(self.seconds + self.per_token * tokens, self.times_own * own)


class Service(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What the order of service looks at. Without targets a request is best effort.

    `tenant` is an opaque name of whoever pays: service is shared out fairly between tenants.
    `program` names an agent's run; its calls age together, within one tenant. `priority` counts for
    the order of that name alone: smaller is sooner. `ttft` and `tpot` (seconds) are the targets.
    """

    tenant: str = ""
    program: str = ""
    priority: int = 0
    ttft: TtftTarget | None = None
    tpot: float | None = None


def parse_ttft(text: str, flag: str = "--slo-ttft") -> TtftTarget | None:
    """Read a TTFT target as the module's text says. Raises ConfigError."""
    plain = text.replace(" ", "")
    if plain == "none":
        return None
    if (found := _PLAIN.fullmatch(plain)) is not None:
        return _checked(TtftTarget(float(found[1]), float(found[2] or 0)), text, flag)
    if (found := _OWN.fullmatch(plain)) is not None:
        made = TtftTarget(float(found[1]), float(found[2] or 0), float(found[3]))
        return _checked(made, text, flag)
    raise _refusal(text, flag)


def parse_tpot(text: str, flag: str = "--slo-tpot") -> float | None:
    """Read a TPOT target: seconds for each token after the first, or none. Raises ConfigError."""
    plain = text.strip()
    if plain == "none":
        return None
    try:
        seconds = float(plain)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"{flag} must be seconds for each token after the first, such as 0.1, or none, not "
            f"{text!r}.",
            flag,
        )
    return seconds


def _checked(target: TtftTarget, text: str, flag: str) -> TtftTarget:
    parts = (target.seconds, target.per_token, target.times_own)
    if target.seconds <= 0 or not all(map(math.isfinite, parts)):
        raise _refusal(text, flag)
    return target


def _refusal(text: str, flag: str) -> ConfigError:
    return ConfigError(
        f"{flag} must be seconds above 0 such as 2, 2+0.001*tokens or max(2,5*own), or none, not "
        f"{text!r}.",
        flag,
    )
