"""Loads by name: which lengths, when they arrive, what they hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from serving.bench import workload as untyped_workload
from serving.errors import ConfigError

#: Kept as it is, byte for byte, so that every engine meets the same load; it has no types.
workload: Any = untyped_workload

_FIXED = re.compile(r"fixed-(\d+)-(\d+)")


@dataclass(frozen=True)
class Load:
    """`count` requests; `rate` requests a second arrive on average, 0 means all at once.

    `lengths` holds (tokens in, tokens out) of each request, `arrivals` seconds from the start.
    """

    text: str
    kind: str
    count: int
    rate: float
    lengths: list[tuple[int, int]]
    arrivals: list[float]

    @property
    def fixed(self) -> bool:
        """True when all requests have the same lengths, as the loads for CPUs do."""
        return self.kind.startswith("fixed-")

    def prompt(self, index: int, vocab_size: int) -> list[int]:
        """Token ids of one request's prompt."""
        found: list[int] = workload.tokens(self.lengths[index][0], vocab_size, index)
        return found


def parse_load(text: str, seed: int = 0) -> Load:
    """Read KIND:N:RATE, KIND being chat, long, code or fixed-IN-OUT. Raises ConfigError."""
    kind, *rest = text.split(":")
    fixed = _FIXED.fullmatch(kind)
    try:
        count, rate = int(rest[0]), float(rest[1])
        known = (fixed is not None or kind in workload.KINDS) and len(rest) == 2
    except (IndexError, ValueError):
        known = False
    if not known or count < 1 or not 0 <= rate < 1e6:
        raise ConfigError(
            f"--load {text!r} is not understood; write KIND:N:RATE, such as chat:200:0 or "
            "fixed-128-64:16:0, with KIND one of chat, long, code, fixed-IN-OUT.",
            "--load",
        )
    if fixed is not None:
        size = (int(fixed[1]), int(fixed[2]))
        if min(size) < 1:
            raise ConfigError(f"--load {text!r}: IN and OUT must be at least 1.", "--load")
        lengths = [size] * count
    else:
        lengths = workload.lengths(kind, count, seed)
    return Load(text, kind, count, rate, lengths, workload.arrivals(count, rate, seed))


def warm_up(loads: list[Load]) -> Load:
    """What runs before anything is measured.

    The 64 chat requests that the peer is warmed up with; when all loads are fixed ones (those are
    for CPUs, where that would take many minutes) two requests of the first one's prompt and
    eight tokens out.
    """
    if all(load.fixed for load in loads):
        return parse_load(f"fixed-{loads[0].lengths[0][0]}-8:{min(2, loads[0].count)}:0")
    return parse_load("chat:64:0", seed=7)


#: Context of the engine that the peer was measured with.
PEER_CONTEXT = 12288


def context_needed(loads: list[Load]) -> int:
    """The peer's context for its loads; for fixed loads what they need."""
    if all(load.fixed for load in loads):
        return max(16, *(sum(load.lengths[0]) for load in [*loads, warm_up(loads)]))
    longest = max(sum(size) for load in loads for size in load.lengths)
    return max(PEER_CONTEXT, longest)
