"""Repetition, presence and frequency penalties of the sequences that ask for them.

Penalties touch only tokens that a sequence has already seen, so each such sequence keeps a short
list of its distinct tokens with their counts instead of a row as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.core import SamplingParams
from serving.sampling.transfer import upload

__all__ = ["PenaltyTable"]


class PenaltyTable:
    """Distinct tokens and output counts, one row a penalised sequence.

    Invariants: the first `lengths[row]` entries of `ids[row]` are distinct; `bounds[row]`, kept on
    the host, is never below `lengths[row]`; a sequence in use has at least one prompt token.
    With the kernels of a GPU each method is a few launches; nothing waits for the device.
    """

    def __init__(
        self, max_slots: int, device: torch.device, kernels: ModuleType | None = None
    ) -> None:
        self._device, self._kernels = device, kernels
        self._row_of = np.full(max_slots, -1, dtype=np.int64)
        self._free: list[int] = []
        self._bounds = np.zeros(0, dtype=np.int64)
        self._ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self._factors = torch.zeros(0, 3, dtype=torch.float32, device=device)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether any penalty is switched on."""
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    @torch.inference_mode()
    def admit(
        self, slot: int, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> None:
        """Start a sequence from its tokens so far: the prompt, and after a replay some output."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        if tokens.size == 0:
            raise ValueError("a sequence with penalties needs at least one prompt token")
        ids = np.unique(tokens)
        counts = np.zeros(ids.size, dtype=np.float32)
        np.add.at(counts, np.searchsorted(ids, tokens[num_prompt_tokens:]), 1.0)
        if not self._free:
            self._grow(rows=max(8, 2 * len(self._bounds)), width=self._ids.shape[1])
        row = self._free.pop()
        self._reserve(ids.size + 64)
        self._row_of[slot] = row
        self._bounds[row] = self._lengths[row] = ids.size
        factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._ids[row, : ids.size] = upload(ids, self._device)
        self._counts[row, : ids.size] = upload(counts, self._device)
        self._factors[row] = upload(np.array(factors, dtype=np.float32), self._device)

    def release(self, slot: int) -> None:
        """Forget a sequence; a slot without penalties is fine."""
        row = int(self._row_of[slot])
        if row >= 0:
            self._row_of[slot] = -1
            self._free.append(row)

    def apply(self, logits: Tensor, at: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Penalise rows `at` [P] of logits [R, V] in place; slots [P] names their sequences.

        Repetition (Keskar et al., 2019): a seen token's logit is divided by the penalty if
        positive, multiplied if negative. Then frequency * count + presence, over the output only.
        """
        host_rows = self._row_of[slots]
        width = int(self._bounds[host_rows].max())
        if self._kernels is not None:
            where, entries = self._pairs(at, host_rows)
            self._kernels.penalize(
                logits, where, entries, self._lengths, self._ids, self._counts, self._factors, width
            )
            return
        rows, where = upload(host_rows, self._device), upload(at, self._device)
        ids, counts = self._ids[rows, :width], self._counts[rows, :width]
        held = torch.arange(width, device=logits.device) < self._lengths[rows].unsqueeze(1)
        ids = torch.where(held, ids, ids[:, :1])
        repetition, presence, frequency = self._factors[rows].unsqueeze(2).unbind(1)
        old = logits[where.unsqueeze(1), ids]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new = new - frequency * counts - presence * (counts > 0)
        # Entries past a sequence's end repeat its first token, with the same value.
        new = torch.where(held, new, new[:, :1])
        logits[where.unsqueeze(1), ids] = new

    def count(self, slots: NDArray[np.int64], tokens: Tensor, at: NDArray[np.int64]) -> None:
        """Add one output token each, tokens[at] [P], to the distinct slots [P]."""
        host_rows = self._row_of[slots]
        self._reserve(int(self._bounds[host_rows].max()) + 1)
        width = int(self._bounds[host_rows].max())
        self._bounds[host_rows] += 1
        if self._kernels is not None:
            where, entries = self._pairs(at, host_rows)
            self._kernels.count_tokens(
                tokens, where, entries, self._lengths, self._ids, self._counts
            )
            return
        rows = upload(host_rows, self._device)
        tokens = tokens[upload(at, self._device)]
        lengths = self._lengths[rows]
        held = torch.arange(width, device=tokens.device) < lengths.unsqueeze(1)
        same = (self._ids[rows, :width] == tokens.unsqueeze(1)) & held
        known = same.any(-1)
        place = torch.where(known, same.int().argmax(-1), lengths)
        self._counts[rows, place] = torch.where(known, self._counts[rows, place], 0.0) + 1.0
        self._ids[rows, place] = tokens
        self._lengths[rows] = lengths + (~known).long()

    def _pairs(self, at: NDArray[np.int64], host_rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Both as int32 on the device, in one copy, each at an aligned address."""
        words = np.zeros((2, -(-len(at) // 4) * 4), dtype=np.int32)
        words[0, : len(at)], words[1, : len(at)] = at, host_rows
        where, entries = upload(words, self._device).unbind()
        return where[: len(at)], entries[: len(at)]

    def _reserve(self, width: int) -> None:
        if width > self._ids.shape[1]:
            self._grow(rows=len(self._bounds), width=max(width, 2 * self._ids.shape[1], 256))

    def _grow(self, rows: int, width: int) -> None:
        old_rows, old_width = self._ids.shape
        self._free.extend(range(old_rows, rows))
        more_rows, more_width = rows - old_rows, width - old_width
        pad = torch.nn.functional.pad
        self._bounds = np.pad(self._bounds, (0, more_rows))
        self._ids = pad(self._ids, (0, more_width, 0, more_rows))
        self._counts = pad(self._counts, (0, more_width, 0, more_rows))
        self._lengths = pad(self._lengths, (0, more_rows))
        self._factors = pad(self._factors, (0, 0, 0, more_rows))
