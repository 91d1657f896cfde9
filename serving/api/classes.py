"""Classes of service: the targets that a request has by naming a class.

`standard` is what --slo-ttft and --slo-tpot say, and what a request gets that names none.
`interactive` and `batch` are there from the start; --slo-class NAME=TTFT,TPOT sets them anew or
adds others. Targets are written as in `serving/config/service.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from serving.config.service import TtftTarget, parse_tpot, parse_ttft
from serving.errors import ConfigError

STANDARD = "standard"
DEFAULT_TTFT = "max(2,5*own)"
DEFAULT_TPOT = "0.1"

_BUILT_IN = ("interactive=0.5+0.0005*tokens,0.05", "batch=none,none")
_FLAG = "--slo-class"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", re.ASCII)
# A target may hold a comma between parentheses, so the last one outside them parts the two.
_ENTRY = re.compile(r"([^=]*)=(.+),([^,()]+)")


@dataclass(frozen=True)
class Targets:
    """Time to the first token, and seconds for each token after it; None: best effort."""

    ttft: TtftTarget | None
    tpot: float | None


def service_classes(
    ttft: str = DEFAULT_TTFT, tpot: str = DEFAULT_TPOT, more: Iterable[str] = ()
) -> dict[str, Targets]:
    """Classes by name, from the three options' texts. Raises ConfigError."""
    classes = {STANDARD: Targets(parse_ttft(ttft), parse_tpot(tpot))}
    for entry in (*_BUILT_IN, *more):
        name, targets = _read(entry)
        classes[name] = targets
    return classes


def _read(entry: str) -> tuple[str, Targets]:
    found = _ENTRY.fullmatch(entry.strip())
    name = found[1].strip() if found is not None else ""
    if found is None or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{_FLAG} must be NAME=TTFT,TPOT such as exam=1,0.05 or report=max(10,5*own),none, "
            f"with a name of at most 32 letters, digits and ._- signs, not {entry!r}.",
            _FLAG,
        )
    if name == STANDARD:
        raise ConfigError(
            f"{_FLAG} cannot set the class {STANDARD}; use --slo-ttft and --slo-tpot.", _FLAG
        )
    return name, Targets(parse_ttft(found[2], _FLAG), parse_tpot(found[3], _FLAG))
