"""How many tokens enter the next micro-batch.

A throttle sees numbers only, never sequences, so it is the same in the engine and in a simulation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What a throttle decides from.

    `decoding` counts sequences that still need decode steps, in flight or not; `ready` those that
    may enter this micro-batch. `waiting_tokens` are prompt tokens not planned yet. `groups` is the
    number of decode groups, one a stage; `turn` counts micro-batches.
    """

    decoding: int
    ready: int
    waiting_tokens: int
    pages_available: int
    num_pages: int
    groups: int
    turn: int


@dataclass(frozen=True)
class Budget:
    """At most so many decode rows and prefill tokens."""

    decode_rows: int
    prefill_tokens: int


class Throttle(ABC):
    """Must never give two zeros while a sequence is ready or prompt tokens wait."""

    @abstractmethod
    def budget(self, load: Load) -> Budget: ...


def even_share(load: Load) -> int:
    """Decode rows of this micro-batch when decodes are split evenly over the groups.

    The remainder rotates with `turn`, so that over `groups` micro-batches every sequence gets one
    place: the sum of (decoding + j) // groups over j in 0..groups-1 is `decoding`.
    """
    return max(1, (load.decoding + load.turn % load.groups) // load.groups)


class Classic(Throttle):
    """A fixed token budget; decodes go first, prefill chunks fill what is left."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def budget(self, load: Load) -> Budget:
        decodes = min(load.ready, even_share(load), self._max_tokens)
        return Budget(decodes, self._max_tokens - decodes)


class Steady(Throttle):
    """Decodes go first; prompt tokens ride along in small pieces while few of them wait.

    A micro-batch of up to about 256 tokens takes little longer than its decodes alone where
    reading the weights decides, so its prompt tokens come almost free. A share of 1/8 of what
    waits (the rule of token throttling, gLLM, 2025) makes the pieces larger as a queue grows.
    """

    cheap = 256
    share = 8
    least = 64

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def budget(self, load: Load) -> Budget:
        decodes = min(load.ready, even_share(load), self._max_tokens)
        left = self._max_tokens - decodes
        if not decodes:
            return Budget(0, left)
        wanted = max(load.waiting_tokens // self.share, self.cheap - decodes, self.least)
        return Budget(decodes, min(left, wanted))


def make_throttle(name: str, max_tokens: int) -> Throttle:
    """The throttle of this name, one of the choices of `EngineConfig.schedule_policy`."""
    throttles: dict[str, type[Classic] | type[Steady]] = {"classic": Classic, "steady": Steady}
    return throttles[name](max_tokens)
