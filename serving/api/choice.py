"""One choice of an answer while it grows: tokens in, safe text and log probabilities out."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.core import SamplingParams, TokenLogprobs, TokenOutput
from serving.errors import EngineDeadError
from serving.tokenizer import Detokenizer


@dataclass(frozen=True)
class ShownToken:
    """A token whose text has been shown, and where its text begins in the answer."""

    logprobs: TokenLogprobs
    offset: int


@dataclass
class Delta:
    """What a choice gained. `finish_reason` is set on its last delta."""

    index: int
    text: str = ""
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class _HeldToken:
    shown: ShownToken
    end: int  # characters that must have been shown before this token may be


class Choice:
    """Assembles one sequence's output.

    Log probabilities of a token leave only with its text: a stop string is not given away through
    them, and the tokens of a matched stop string never leave. Without a detokenizer (a folder
    without tokenizer) the text is empty and every output makes a delta.
    """

    def __init__(self, index: int, params: SamplingParams, detokenizer: Detokenizer | None) -> None:
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._wants_logprobs = params.logprobs is not None
        self._detokenizer = detokenizer
        self._held: list[_HeldToken] = []

    def take(self, output: TokenOutput) -> Delta | None:
        """Add an output; None when nothing can be shown for it yet."""
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.finish_reason == "abort":
            raise EngineDeadError("The engine gave up this request.")
        if self._detokenizer is None:
            return self._take_ids(output)
        delta = Delta(self.index)
        for position, token_id in enumerate(output.token_ids):
            before = self._detokenizer.decoded_chars
            delta.text += self._detokenizer.feed((token_id,))
            self.num_tokens += 1
            if self._wants_logprobs and output.logprobs is not None:
                self._hold(output.logprobs[position], before)
            if self._detokenizer.stop_string is not None:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and output.finish_reason is not None:
            self._end(output)
            delta.text += self._detokenizer.finish()
            if self._detokenizer.stop_string is not None:
                self.finish_reason = "stop"
        if self._held:
            delta.tokens = self._release()
        delta.finish_reason = self.finish_reason
        return delta if delta.text or delta.tokens or delta.finish_reason else None

    def _take_ids(self, output: TokenOutput) -> Delta | None:
        self.num_tokens += len(output.token_ids)
        delta = Delta(self.index)
        if self._wants_logprobs:
            delta.tokens = [ShownToken(one, 0) for one in output.logprobs or []]
        if output.finish_reason is not None:
            self._end(output)
            delta.finish_reason = self.finish_reason
        return delta if output.token_ids or delta.finish_reason else None

    def _end(self, output: TokenOutput) -> None:
        self.finish_reason = output.finish_reason
        if output.stop_token_id is not None:
            self.num_tokens += 1  # it was generated, though it has no text

    def _hold(self, logprobs: TokenLogprobs, offset: int) -> None:
        assert self._detokenizer is not None
        # An unfinished character counts as one that is still to be shown.
        end = self._detokenizer.decoded_chars + self._detokenizer.pending
        self._held.append(_HeldToken(ShownToken(logprobs, offset), end))

    def _release(self) -> list[ShownToken]:
        assert self._detokenizer is not None
        shown = self._detokenizer.shown_chars
        ready = 0
        while ready < len(self._held) and self._held[ready].end <= shown:
            ready += 1
        free = [held.shown for held in self._held[:ready]]
        self._held = [] if self.finish_reason == "stop" else self._held[ready:]
        return free
