"""Chooses the next token of every row of a micro-batch, whatever mix of settings the rows have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.core import MAX_LOGPROBS, SamplingParams
from serving.kernels import native_draw
from serving.sampling.candidates import largest
from serving.sampling.draw import draw
from serving.sampling.filters import logit_floor
from serving.sampling.penalties import PenaltyTable
from serving.sampling.rng import stream_key, uniforms
from serving.sampling.transfer import upload

__all__ = ["FILTER", "LOGPROBS", "PENALTY", "SampleOutput", "Sampler"]

#: What a slot's flags say: its rows need more than their logits, temperature and number.
PENALTY, LOGPROBS, FILTER = 1, 2, 4
# Below this a temperature means greedy but for ties, and its reciprocal would overflow.
_COLDEST = 1e-5


@dataclass
class SampleOutput:
    """Tokens of R rows, on the device of the logits.

    When any row asked for log probabilities: `logprobs` [R] of the chosen tokens, and the most
    likely tokens `top_ids` and `top_logprobs` [R, N], best first, N the largest number asked for.
    They come from the model's own logits, before penalties and temperature. Rows that did not ask
    hold zeros; a row that asked for fewer than N uses its first ones.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class Sampler:
    """Per-slot settings in arrays; `sample` reads them for all rows at once.

    A row's token depends on its logits, its settings, its own tokens and its uniform number
    (`serving.sampling.rng`), never on its slot or its neighbours.
    """

    def __init__(
        self,
        vocab_size: int,
        max_slots: int,
        device: torch.device | str = "cpu",
        eos_token_ids: Sequence[int] = (),
        kernels: ModuleType | None = None,
    ) -> None:
        self._vocab, self._device = vocab_size, torch.device(device)
        self._eos = tuple(eos_token_ids)
        self._flags = np.zeros(max_slots, dtype=np.uint8)
        self._temperature = np.zeros(max_slots, dtype=np.float32)
        self._top_k = np.zeros(max_slots, dtype=np.int64)
        self._top_p = np.ones(max_slots, dtype=np.float32)
        self._min_p = np.zeros(max_slots, dtype=np.float32)
        self._keys = np.zeros(max_slots, dtype=np.uint64)
        self._num_logprobs = np.zeros(max_slots, dtype=np.int64)
        # Stop tokens are banned at positions below this.
        self._min_end = np.zeros(max_slots, dtype=np.int64)
        self._banned: dict[int, NDArray[np.int64]] = {}
        self._penalties = PenaltyTable(max_slots, self._device, kernels)

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        choice: int = 0,
    ) -> None:
        """Put a sequence into a slot. token_ids: its prompt, and after a replay its output so far.

        A sampled sequence (temperature above 0) must have a seed; raises ValueError otherwise.
        """
        self.release(slot)
        greedy = params.temperature < _COLDEST
        if params.seed is None and not greedy:
            raise ValueError("a sampled sequence needs a seed; the driver draws one when absent")
        top_k = params.top_k if 0 < params.top_k < self._vocab else 0
        self._temperature[slot] = 0.0 if greedy else params.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = top_k, params.top_p, params.min_p
        self._keys[slot] = stream_key(params.seed or 0, choice)
        flags = 0
        if not greedy and (top_k or params.top_p < 1.0 or params.min_p > 0.0):
            flags |= FILTER
        if params.logprobs is not None:
            flags |= LOGPROBS
            self._num_logprobs[slot] = params.logprobs
        if PenaltyTable.wanted(params):
            flags |= PENALTY
            self._penalties.admit(slot, params, token_ids, num_prompt_tokens)
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops.update(self._eos)
        if params.min_tokens > 0 and stops:
            self._min_end[slot] = num_prompt_tokens + params.min_tokens
            self._banned[slot] = np.array(sorted(stops), dtype=np.int64)
        self._flags[slot] = flags

    def release(self, slot: int) -> None:
        """Forget the sequence in a slot; an empty slot is fine."""
        self._penalties.release(slot)
        self._banned.pop(slot, None)
        self._flags[slot] = 0
        self._min_end[slot] = 0

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Sequence[int],
        slots_host: Sequence[int] | None = None,
    ) -> SampleOutput:
        """One token for each row. logits: [R, V] float32, left as they are; slots: [R], distinct.

        positions[i] is the place the token will take in its sequence: the number of tokens before
        it. slots_host spares a wait for the device where slots is not on the CPU.
        """
        rows = np.asarray(slots.tolist() if slots_host is None else slots_host, dtype=np.int64)
        places = np.asarray(positions, dtype=np.int64)
        flags = self._flags[rows]
        raw = logits
        logits = self._adjust(logits, rows, places, flags)
        temperature = self._temperature[rows]
        sampled = temperature > 0.0
        if not sampled.any():
            token_ids = logits.argmax(-1)
        elif sampled.all():
            token_ids = self._draw(logits, rows, places, flags)
        else:
            token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
            warm, cold = self._indices(sampled), self._indices(~sampled)
            token_ids[cold] = logits[cold].argmax(-1)
            token_ids[warm] = self._draw(
                logits[warm], rows[sampled], places[sampled], flags[sampled]
            )
        penalised = (flags & PENALTY) > 0
        if penalised.any():
            self._penalties.count(rows[penalised], token_ids, np.flatnonzero(penalised))
        asked = (flags & LOGPROBS) > 0
        if asked.any():
            return self._with_logprobs(raw, token_ids, rows, asked)
        return SampleOutput(token_ids)

    def _indices(self, mask: NDArray[np.bool_]) -> Tensor:
        return self._upload(np.flatnonzero(mask))

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)

    def _adjust(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        flags: NDArray[np.uint8],
    ) -> Tensor:
        """Penalties, then stop tokens that min_tokens bans; a copy if anything changes."""
        penalised = (flags & PENALTY) > 0
        too_short = places < self._min_end[rows]
        if not (penalised.any() or too_short.any()):
            return logits
        logits = logits.clone()
        if penalised.any():
            self._penalties.apply(logits, np.flatnonzero(penalised), rows[penalised])
        for row in np.flatnonzero(too_short):
            logits[row, self._upload(self._banned[int(rows[row])])] = -torch.inf
        return logits

    def _draw(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        flags: NDArray[np.uint8],
    ) -> Tensor:
        """Rows that sample: filters where asked for, then the inverse CDF."""
        u = self._upload(uniforms(self._keys[rows], places))
        temperature = self._upload(self._temperature[rows])
        filtered = (flags & FILTER) > 0
        if filtered.all():
            return self._draw_filtered(logits, temperature, u, rows)
        if not filtered.any():
            return self._draw_plain(logits, temperature, u)
        # Each row takes the way it would take alone.
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        some, others = self._indices(filtered), self._indices(~filtered)
        token_ids[some] = self._draw_filtered(
            logits[some], temperature[some], u[some], rows[filtered]
        )
        token_ids[others] = self._draw_plain(logits[others], temperature[others], u[others])
        return token_ids

    def _draw_plain(self, logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
        drawn = native_draw(logits, temperature, u)
        return draw(_mass(logits, temperature), u) if drawn is None else drawn

    def _draw_filtered(
        self, logits: Tensor, temperature: Tensor, u: Tensor, rows: NDArray[np.int64]
    ) -> Tensor:
        mass = _mass(logits, temperature)
        mass.mul_(logits >= self._floor(logits, mass, temperature, rows).unsqueeze(1))
        return draw(mass, u)

    def _floor(
        self, logits: Tensor, mass: Tensor, temperature: Tensor, rows: NDArray[np.int64]
    ) -> Tensor:
        top_k = self._top_k[rows]
        return logit_floor(
            logits,
            mass,
            temperature,
            self._upload(top_k),
            self._upload(self._top_p[rows]),
            self._upload(self._min_p[rows]),
            int(top_k.max()),
        )

    def _with_logprobs(
        self,
        raw: Tensor,
        token_ids: Tensor,
        rows: NDArray[np.int64],
        asked: NDArray[np.bool_],
    ) -> SampleOutput:
        at = self._indices(asked)
        raw = raw[at]
        scale = raw.logsumexp(-1)
        width = int(self._num_logprobs[rows[asked]].max())
        count = len(rows)
        logprobs = torch.zeros(count, device=self._device)
        top_ids = torch.zeros(count, width, dtype=torch.int64, device=self._device)
        top_logprobs = torch.zeros(count, width, device=self._device)
        logprobs[at] = raw.gather(1, token_ids[at].unsqueeze(1)).squeeze(1) - scale
        if width:
            # Always the same number of candidates: which of several equal ones is named would
            # otherwise depend on what the neighbours asked for.
            values, ids = largest(raw, min(MAX_LOGPROBS, self._vocab))
            top_ids[at] = ids[:, :width]
            top_logprobs[at] = values[:, :width] - scale.unsqueeze(1)
        return SampleOutput(token_ids, logprobs, top_ids, top_logprobs)


def _mass(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities [R, V] at each row's temperature [R], a new tensor."""
    return torch.softmax(logits / temperature.unsqueeze(1), dim=-1)
