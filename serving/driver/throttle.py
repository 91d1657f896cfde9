"""How many tokens enter the next micro-batch.

A throttle sees numbers only, never sequences, so it is the same in the engine and in a simulation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import msgspec

from serving.config.engine import EngineConfig


class Load(msgspec.Struct, frozen=True):
    """What a throttle decides from.

    `decoding` counts sequences that still need decode steps, in flight or not; `ready` those that
    may enter this micro-batch. `waiting_tokens` are prompt tokens not planned yet, of which
    `entered_tokens` belong to sequences that hold their pages. `pages_reserved` will be taken by
    running sequences (0 where the throttle keeps no reserve). `groups` is the number of decode
    groups, one a stage; `turn` counts micro-batches.
    """

    decoding: int
    ready: int
    waiting_tokens: int
    pages_available: int
    num_pages: int
    groups: int
    turn: int
    entered_tokens: int = 0
    pages_reserved: int = 0


class Budget(msgspec.Struct, frozen=True):
    """At most so many decode rows and prefill tokens."""

    decode_rows: int
    prefill_tokens: int


class Throttle(ABC):
    """Must never give two zeros while a sequence is ready or prompt tokens wait.

    With `keeps_reserve` the scheduler lets a prompt in only if running sequences can still end.
    """

    keeps_reserve = False

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


class TokenThrottle(Throttle):
    """Prompt tokens and decodes are metered apart, so that all micro-batches cost alike.

    After token throttling in gLLM (arXiv 2504.14775): decodes are split evenly over the groups, and
    prompt tokens are the smaller of two figures. One spreads what waits over several micro-batches.
    The other falls with the pages that nobody needs, `pages_available` less `pages_reserved`.

    Three things differ. `spread` micro-batches are for 2,048 waiting tokens, and their number grows
    with the root of the tokens: n tokens in pieces of c pass P stages in (n / c + P - 1) (a + b c)
    seconds, which is least for a c that grows with the root of n. The pace of a queue is kept until
    the queue is empty: pieces that shrink with it would make its end long and the micro-batches
    unlike. And a prompt gets all its pages when it is let in, which the scheduler does only against
    the reserve; so prompts that hold their pages go on at `floor` when no page is left over, and a
    micro-batch without decodes never comes empty.
    """

    keeps_reserve = True
    backlog = 2048

    def __init__(self, max_tokens: int, spread: int, floor: int) -> None:
        self._max_tokens = max_tokens
        self._spread = spread
        self._floor = floor
        self._pace = 0

    def budget(self, load: Load) -> Budget:
        decodes = min(load.ready, even_share(load), self._max_tokens)
        if not load.waiting_tokens:
            self._pace = 0
            return Budget(decodes, self._max_tokens - decodes)
        pace = math.ceil(math.sqrt(load.waiting_tokens * self.backlog) / self._spread)
        self._pace = max(self._pace, pace)
        floor = max(self._floor - decodes, -(-self._floor // 4))
        room = max(0, load.pages_available - load.pages_reserved)
        goes_on = room or load.entered_tokens or not decodes
        by_pages = self._max_tokens * room // max(room, load.num_pages - load.pages_reserved, 1)
        prefill = min(max(self._pace, floor), max(by_pages, floor if goes_on else 0))
        return Budget(decodes, min(prefill, self._max_tokens - decodes))


def make_throttle(config: EngineConfig) -> Throttle:
    """The throttle of `config.policy`."""
    most = config.max_num_batched_tokens
    if config.policy == "throttle":
        return TokenThrottle(most, config.prefill_spread, config.prefill_floor)
    return Steady(most) if config.policy == "steady" else Classic(most)
