"""Sampling on a GPU: kernel launches only, no wait for the device and no sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.core import MAX_LOGPROBS, SamplingParams
from serving.sampling.rng import uniforms
from serving.sampling.sampler import FILTER, LOGPROBS, PENALTY, SampleOutput, Sampler
from serving.sampling.transfer import upload

__all__ = ["DeviceSampler", "RowNumbers"]


@dataclass(frozen=True)
class RowNumbers:
    """What every row needs beside its logits: [R] each. Temperature 0 is greedy, and its uniform
    number means nothing."""

    temperature: NDArray[np.float32]
    uniform: NDArray[np.float64]


class DeviceSampler(Sampler):
    """`Sampler` by kernels, for logits of any float dtype; `draw` takes the place of `sample`.

    A row's token depends on its own logits and settings only: every kind of row always goes
    through the same kernels with the same dtype, whatever its neighbours are. Rows that penalties
    or bans change are drawn from a float32 copy of their own; the caller's logits stay as they are.
    """

    def __init__(
        self,
        vocab_size: int,
        max_slots: int,
        device: torch.device | str,
        eos_token_ids: Sequence[int],
        kernels: ModuleType,
    ) -> None:
        super().__init__(vocab_size, max_slots, device, eos_token_ids, kernels)
        self._kernels = kernels
        # One place more than there are slots, for padding rows: there everything is off.
        self._table = np.zeros((4, -(-(max_slots + 1) // 4) * 4), dtype=np.int32)
        self._k, self._alternatives = self._table[0], self._table[3]
        self._p, self._reach = self._table[1].view(np.float32), self._table[2].view(np.float32)
        self._p[:], self._reach[:] = 1.0, -np.inf
        self._on_device = torch.from_numpy(self._table.copy()).to(self._device)
        self._changed = False

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        choice: int = 0,
    ) -> None:
        super().admit(slot, params, token_ids, num_prompt_tokens, choice)
        flags = self._flags[slot]
        if flags & FILTER:
            self._k[slot], self._p[slot] = self._top_k[slot], self._top_p[slot]
            if params.min_p > 0.0:
                warmth, share = torch.tensor([params.temperature, params.min_p])
                self._reach[slot] = float(warmth * share.log())
        if flags & LOGPROBS:
            # Always the same number of candidates, whatever a row and its neighbours asked for.
            self._alternatives[slot] = min(MAX_LOGPROBS, self._vocab)
        self._changed = self._changed or bool(flags & (FILTER | LOGPROBS))

    def release(self, slot: int) -> None:
        if self._flags[slot] & (FILTER | LOGPROBS):
            self._k[slot], self._p[slot], self._reach[slot] = 0, 1.0, -np.inf
            self._alternatives[slot] = 0
            self._changed = True
        super().release(slot)

    def numbers(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> RowNumbers:
        """Of the tokens at these positions, see `Sampler.sample`."""
        return RowNumbers(self._temperature[slots], uniforms(self._keys[slots], positions))

    def all_plain(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> bool:
        """Whether the kernels `draw_tokens` can draw these rows from their logits alone."""
        return not (self._flags[slots].any() or (positions < self._min_end[slots]).any())

    @torch.inference_mode()
    def draw(
        self,
        logits: Tensor,
        slots_host: NDArray[np.int64],
        positions: NDArray[np.int64],
        *,
        slots: Tensor,
        temperature: Tensor,
        uniform: Tensor,
        last_tokens: Tensor,
        out: Tensor,
    ) -> SampleOutput:
        """One token for each of R rows, into `out` [R] int32 and into `last_tokens` by slot.

        logits: [R, V], left as they are; slots_host and slots (int32): [R], distinct; positions
        [R]: as for `sample`; temperature [R] float32 and uniform [R] float64: what `numbers` gave,
        on the device. Token ids of the result are int32. Everything runs on the current stream.
        """
        flags = self._flags[slots_host]
        too_short = positions < self._min_end[slots_host]
        penalised = (flags & PENALTY) > 0
        filtered = (flags & FILTER) > 0
        asked = (flags & LOGPROBS) > 0
        if self._changed:
            # A copy, as the table may change again before this one is on the device.
            self._on_device.copy_(upload(self._table.copy(), self._device), non_blocking=True)
            self._changed = False
        changed = penalised | too_short
        if not changed.all():
            self._launch(
                logits, slots, temperature, uniform, last_tokens, out,
                filtered=bool(filtered[~changed].any()),
            )  # fmt: skip
        if changed.any():
            at = np.flatnonzero(changed)
            where = upload(at, self._device)
            own = self._changed_logits(logits[where], at, slots_host, penalised, too_short)
            drawn = torch.empty(len(at), dtype=torch.int32, device=self._device)
            self._launch(
                own, slots[where], temperature[where], uniform[where], last_tokens, drawn,
                filtered=bool(filtered[changed].any()),
            )  # fmt: skip
            out.index_copy_(0, where, drawn)
        if penalised.any():
            self._penalties.count(slots_host[penalised], out, np.flatnonzero(penalised))
        if not asked.any():
            return SampleOutput(out)
        width = int(self._num_logprobs[slots_host[asked]].max())
        found = self._kernels.token_logprobs(logits, out, slots, self._on_device[3], width)
        return SampleOutput(out, *found)

    def _launch(
        self,
        logits: Tensor,
        slots: Tensor,
        temperature: Tensor,
        uniform: Tensor,
        last_tokens: Tensor,
        out: Tensor,
        *,
        filtered: bool,
    ) -> None:
        floors = None
        if filtered:
            table = self._on_device
            floors = self._kernels.filter_floors(
                logits, temperature, slots, table[0], table[1].view(torch.float32),
                table[2].view(torch.float32),
            )  # fmt: skip
        self._kernels.draw_tokens(logits, temperature, uniform, slots, last_tokens, out, floors)

    def _changed_logits(
        self,
        rows: Tensor,
        at: NDArray[np.int64],
        slots: NDArray[np.int64],
        penalised: NDArray[np.bool_],
        too_short: NDArray[np.bool_],
    ) -> Tensor:
        """`rows` [C, V], copies of the rows `at` [C], with penalties, then bans, in float32."""
        own = rows.float()
        some = np.flatnonzero(penalised[at])
        if len(some):
            self._penalties.apply(own, some, slots[at[some]])
        some = np.flatnonzero(too_short[at])
        if len(some):
            banned = [self._banned[slot] for slot in slots[at[some]].tolist()]
            counts = [len(tokens) for tokens in banned]
            room = -(-sum(counts) // 4) * 4
            words = np.zeros((2, room), dtype=np.int32)
            words[0, : sum(counts)] = np.repeat(some, counts)
            words[1, : sum(counts)] = np.concatenate(banned)
            pairs = upload(words, self._device)[:, : sum(counts)]
            self._kernels.ban_tokens(own, pairs[0], pairs[1])
        return own

    def warm_up(self, logits: Tensor) -> None:
        """Launch everything once on these logits [R, V]; no slot may be in use.

        Kernels are compiled, and memory is taken as in the most demanding step.
        """
        slots = np.zeros(logits.shape[0], dtype=np.int64)
        positions = np.ones_like(slots)
        every = SamplingParams(seed=0, top_k=2, top_p=0.5, min_p=0.1, logprobs=1)
        changed = SamplingParams(
            seed=0, top_p=0.5, presence_penalty=0.1, min_tokens=1, stop_token_ids=[0], logprobs=1
        )
        for params in (every, changed):
            self.admit(0, params, [0], 1)
            numbers = self.numbers(slots, positions)
            self.draw(
                logits, slots, positions,
                slots=upload(slots.astype(np.int32), self._device),
                temperature=upload(numbers.temperature, self._device),
                uniform=upload(numbers.uniform, self._device),
                last_tokens=torch.zeros(1, dtype=torch.int32, device=self._device),
                out=torch.zeros(len(slots), dtype=torch.int32, device=self._device),
            )  # fmt: skip
        self.release(0)
