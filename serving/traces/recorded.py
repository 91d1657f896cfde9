"""A recorded load and what may be done to it: cut, scale in time, mix with long prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from serving.errors import ConfigError

#: Tokens that one of a request's `blocks` stands for.
BLOCK = 512


@dataclass(frozen=True)
class Recorded:
    """One request: seconds from the start, tokens of prompt and answer (both at least 1).

    `blocks` has one id for each BLOCK tokens of the prompt, the last one maybe of fewer: equal ids
    mean equal tokens up to there. `text` and `answer` are those of a call that was recorded with
    them, `prompt` its token ids (int32) once a tokenizer has seen it, `session` whose call it is.
    """

    at: float
    tokens_in: int
    tokens_out: int
    blocks: tuple[int, ...] = ()
    text: str = ""
    answer: str = ""
    session: str = ""
    prompt: NDArray[np.int32] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Trace:
    """Requests by arrival, the first at 0. `shares`: prompts begin alike, so caching them helps.

    `skipped` counts what was in the file and cannot be run, such as calls without text.
    """

    name: str
    requests: list[Recorded]
    shares: bool
    skipped: int = 0

    @property
    def rate(self) -> float:
        """Requests a second on average; 0 when the trace has no duration."""
        span = self.requests[-1].at - self.requests[0].at
        return (len(self.requests) - 1) / span if span > 0 else 0.0

    def first(self, count: int) -> Trace:
        """The first requests by arrival."""
        return replace(self, requests=self.requests[:count])

    def stretched(self, factor: float) -> Trace:
        """All times multiplied by a factor: 2 halves the rate."""
        return replace(self, requests=[replace(one, at=one.at * factor) for one in self.requests])

    def at_rate(self, rate: float) -> Trace:
        """Stretched until `rate` requests a second come on average. Raises ConfigError."""
        if not self.rate:
            raise ConfigError(
                f"{self.name} has no duration, so its rate cannot be changed; give more "
                "--requests.",
                "--rate",
            )
        return self.stretched(self.rate / rate)

    def fitting(self, context: int) -> Trace:
        """Without requests that are longer than the context; the rest starts at 0 again."""
        kept = [one for one in self.requests if one.tokens_in + one.tokens_out <= context]
        start = kept[0].at if kept else 0.0
        return replace(self, requests=[replace(one, at=one.at - start) for one in kept])

    def tokenised(self, encode: Callable[[str], list[int]]) -> Trace:
        """With the texts as token ids, and lengths counted by them."""
        return replace(self, requests=[_tokenised(one, encode) for one in self.requests])


@dataclass(frozen=True)
class Mix:
    """A share of the requests that get a prompt of so many tokens."""

    share: float
    tokens: int

    @classmethod
    def parse(cls, text: str, flag: str = "--mix") -> Mix:
        """Read SHARE:TOKENS such as 0.1:8192. Raises ConfigError."""
        share, _, tokens = text.partition(":")
        try:
            made = cls(float(share), int(tokens))
        except ValueError:
            made = cls(math.nan, 0)
        if not 0 < made.share <= 1 or made.tokens < 1:
            raise ConfigError(
                f"{flag} must be a share of the requests and the tokens of their prompts, such as "
                f"0.1:8192, not {text!r}.",
                flag,
            )
        return made

    def into(self, trace: Trace, seed: int) -> Trace:
        """The trace with long prompts, which begin like no other, in places drawn by the seed.

        Arrivals and lengths of answers stay. Exactly the share of the requests, rounded, is drawn.
        """
        count = len(trace.requests)
        chosen = np.random.default_rng([seed, 3]).permutation(count)[: round(self.share * count)]
        requests = list(trace.requests)
        for place in chosen.tolist():
            requests[place] = replace(
                requests[place], tokens_in=self.tokens, blocks=(), text="", answer="", prompt=None
            )
        return replace(trace, requests=requests)


def _tokenised(one: Recorded, encode: Callable[[str], list[int]]) -> Recorded:
    if not one.text:
        return one
    ids = np.array(encode(one.text), dtype=np.int32)
    return replace(one, prompt=ids, tokens_in=len(ids), tokens_out=max(1, len(encode(one.answer))))
