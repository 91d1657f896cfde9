"""The nouns of the engine, used everywhere with one meaning.

`Request` is what a client asked; `Sequence` is one token stream of it; `Page` is a fixed run of KV
slots; `MicroBatch` is what the stages run together once; `StepPlan` is the immutable description of
one micro-batch that the driver sends to every stage; `Layout` says which stage owns which layers.

Nothing here imports torch or an HTTP library.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Literal

import msgspec

from serving.config.service import Service
from serving.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20
MAX_CHOICES = 128


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How tokens are chosen and when a sequence ends.

    `top_k` 0 or -1 switches the filter off, `temperature` 0 is greedy, `max_tokens` None means as
    many as the context leaves. `logprobs` is the number of alternatives returned for each token.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequestError naming the first field that is out of its range."""
        if self.max_tokens is not None:
            _at_least(self.max_tokens, 1, "max_tokens")
        _at_least(self.min_tokens, 0, "min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}); "
                "lower min_tokens or raise max_tokens.",
                "min_tokens",
            )
        _in_range(self.temperature, 0.0, 100.0, "temperature")
        _at_least(self.top_k, -1, "top_k")
        _in_range(self.top_p, 0.0, 1.0, "top_p", open_low=True)
        _in_range(self.min_p, 0.0, 1.0, "min_p")
        _in_range(self.repetition_penalty, 0.0, 100.0, "repetition_penalty", open_low=True)
        _in_range(self.presence_penalty, -2.0, 2.0, "presence_penalty")
        _in_range(self.frequency_penalty, -2.0, 2.0, "frequency_penalty")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError("seed must be an integer of at most 64 bits.", "seed")
        for text in self.stop:
            if not text:
                raise InvalidRequestError("stop must not contain an empty string.", "stop")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids contains {token}, but this model's tokens are 0 to "
                    f"{vocab_size - 1}.",
                    "stop_token_ids",
                )
        if self.logprobs is not None:
            _in_range(self.logprobs, 0, MAX_LOGPROBS, "logprobs")
        _in_range(self.n, 1, MAX_CHOICES, "n")


def _at_least(value: float, low: float, name: str) -> None:
    if not value >= low:
        raise InvalidRequestError(f"{name} must be at least {low}, not {value}.", name)


def _in_range(value: float, low: float, high: float, name: str, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not (math.isfinite(value) and inside):
        bound = f"above {low}" if open_low else f"at least {low}"
        raise InvalidRequestError(f"{name} must be {bound} and at most {high}, not {value}.", name)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log probability of one token, and of the most likely tokens at its place, best first."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class TokenOutput(msgspec.Struct, kw_only=True, frozen=True):
    """A piece of one sequence's output as it leaves the engine.

    `token_ids` never holds the stop token that ended the sequence; that one is `stop_token_id`.
    `queued` marks an empty output that only says: accepted, waiting to be scheduled.
    `cached_tokens` counts prompt tokens that the prefix cache supplied.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    queued: bool = False


class Request(msgspec.Struct, kw_only=True, frozen=True):
    """What a client asked: one prompt, one choice of it.

    `stream` is the number under which outputs return to the client's process, unique for the life
    of an engine. `cache_salt` starts the prefix-cache hash, so prompts share pages only inside one
    salt. `service` is what the order of service looks at. `max_tokens` is already resolved: never
    None, and prompt + max_tokens fits the context; `params.seed` is never None either. `prompt` are
    token ids, int32, little-endian.
    """

    stream: int
    prompt: bytes
    params: SamplingParams
    max_tokens: int
    choice: int = 0
    cache_salt: str = ""
    service: Service = Service()


class Sequence:
    """One token stream inside the driver, from arrival to its last page's return.

    Objects appear at admission and at the end; what every step touches lives in arrays by `slot`
    (`serving/driver/slots.py`). Invariant: 0 <= cached <= tokens known.
    """

    __slots__ = (
        "admitted",
        "arrival",
        "cached",
        "ended",
        "hashes",
        "hit_pages",
        "order_key",
        "pages",
        "prompt_len",
        "registered",
        "request",
        "slot",
        "tokens",
    )

    def __init__(self, request: Request, tokens: NDArray[np.int32], arrival: float) -> None:
        self.request = request
        self.tokens = tokens  # prompt, and everything generated before it was put back
        self.prompt_len = len(tokens)
        self.arrival = arrival
        self.order_key = 0  # rank of arrival, given by the scheduler
        self.slot = -1
        self.pages: list[int] = []
        self.hashes: list[bytes] = []  # chained keys of its first full pages
        self.registered = 0  # of them, how many pages were offered to the prefix cache
        self.cached = 0
        self.hit_pages = 0  # full pages that the cache held when it was last looked at
        self.admitted = False  # has ever left the queue
        self.ended = False


class Page(msgspec.Struct, frozen=True):
    """What the prefix cache knows of one page: its number, chained hash and exact tokens.

    Tokens are compared on a hit, so two prompts never share KV by a collision.
    """

    number: int
    key: bytes
    tokens: bytes


class MicroBatch:
    """What the stages run together once, as the driver remembers it while it is in flight.

    Row order is decodes first, then prefill chunks. `sampled` holds the slots that get a token, in
    the order in which the last stage returns them.
    """

    __slots__ = (
        "decode_slots",
        "number",
        "prefill_lens",
        "prefill_slots",
        "sampled",
        "sent_at",
    )

    def __init__(
        self,
        number: int,
        decode_slots: NDArray[np.int64],
        prefill_slots: NDArray[np.int64],
        prefill_lens: NDArray[np.int64],
        sampled: NDArray[np.int64],
    ) -> None:
        self.number = number
        self.decode_slots = decode_slots
        self.prefill_slots = prefill_slots
        self.prefill_lens = prefill_lens
        self.sampled = sampled
        self.sent_at = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + int(self.prefill_lens.sum())


class Admission(msgspec.Struct, kw_only=True, frozen=True, array_like=True):
    """A sequence enters a slot. Stages in the middle get neither tokens nor params.

    `computed` tokens are already in the pages that the same plan puts into the page table.
    `tokens` are int32, little-endian: the prompt, and the output so far of a sequence that was put
    back.
    """

    slot: int
    num_tokens: int
    computed: int
    prompt_len: int
    tokens: bytes = b""
    params: SamplingParams | None = None
    choice: int = 0


class StepPlan(msgspec.Struct, kw_only=True, frozen=True, tag="plan", array_like=True):
    """One micro-batch as a delta against what the stages already mirror.

    `number` counts up by one; a gap is fatal. Applied in this order: `released`, `admitted`,
    `page_*` (page_ids[i] becomes entry page_columns[i] of slot page_slots[i]), then the rows. A
    decode row advances its slot by one token, prefill row i by prefill_lens[i]; a prefill row whose
    tokens are then all computed is sampled. Slots are uint16, the rest uint32, little-endian.
    """

    number: int
    epoch: int = 0
    decode_slots: bytes = b""
    prefill_slots: bytes = b""
    prefill_lens: bytes = b""
    page_slots: bytes = b""
    page_columns: bytes = b""
    page_ids: bytes = b""
    released: bytes = b""
    admitted: list[Admission] = []


class Layout(msgspec.Struct, frozen=True):
    """Which stage owns which layers: stage i has layers bounds[i] to bounds[i + 1] - 1.

    `epoch` counts layouts. Every plan names its epoch, and a stage switches at the first
    micro-batch of a new one.
    """

    epoch: int
    bounds: list[int]

    @classmethod
    def even(cls, num_layers: int, stages: int) -> Layout:
        """Split evenly; what does not divide goes to the first stages, as the last has the head."""
        small, more = divmod(num_layers, stages)
        return cls.of_counts([small + (stage < more) for stage in range(stages)])

    @classmethod
    def of_counts(cls, counts: list[int]) -> Layout:
        """Layout of epoch 0 with `counts[i]` layers on stage i."""
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return cls(0, bounds)

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    @property
    def counts(self) -> list[int]:
        """Number of layers of each stage."""
        return [len(self.layers(stage)) for stage in range(self.num_stages)]

    def layers(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def owner(self, layer: int) -> int:
        return bisect_right(self.bounds, layer) - 1

    def windows(self, movable: int) -> list[range]:
        """Where each bound may come to lie when it moves by at most `movable` layers from here and
        every stage keeps a layer."""
        last, layers = self.num_stages, self.bounds[-1]
        inner = [
            range(max(index, bound - movable), min(layers - last + index, bound + movable) + 1)
            for index, bound in enumerate(self.bounds[1:-1], start=1)
        ]
        return [range(1), *inner, range(layers, layers + 1)]

    def resident(self, stage: int, movable: int) -> range:
        """The layers that a stage may come to own in that way: it holds weights and KV for all."""
        windows = self.windows(movable)
        return range(windows[stage][0], windows[stage + 1][-1])

    def residents(self, layer: int, movable: int) -> list[int]:
        """The stages that may come to own a layer."""
        return [n for n in range(self.num_stages) if layer in self.resident(n, movable)]

    def pieces(self, stage: int, movable: int) -> list[range]:
        """The resident layers of a stage, in runs that it owns or lacks as a whole: those that it
        never gives away, and every other one by itself."""
        windows = self.windows(movable)
        resident = self.resident(stage, movable)
        kept = range(windows[stage][-1], windows[stage + 1][0])
        if not kept:
            kept = range(resident.start, resident.start)
        alone = [range(n, n + 1) for n in resident if n not in kept]
        return sorted([*alone, *([kept] if kept else [])], key=lambda piece: piece.start)
