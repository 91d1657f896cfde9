"""From a mirror's rows to the tensors of a step, on the stage's device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.attention import StepInputs
from serving.stage.mirror import Rows


class InputBuilder:
    """Builds StepInputs ahead of the activations; on the first stage also holds the last tokens.

    `last_tokens` has one token a slot, written when sampled tokens arrive, so that a decode needs
    nothing from the driver but its slot.
    """

    def __init__(self, num_slots: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def build(self, rows: Rows) -> StepInputs:
        """Everything but the ids of decode rows, which `fill_tokens` puts in."""
        token_ids = torch.zeros(len(rows.positions), dtype=torch.int64, device=self._device)
        if len(rows.prompt_tokens):
            token_ids[rows.num_decodes :] = self._tensor(rows.prompt_tokens)
        return StepInputs(
            token_ids=token_ids,
            positions=self._tensor(rows.positions),
            slot_mapping=self._tensor(rows.slot_mapping),
            query_starts=self._tensor(rows.query_starts),
            context_lens=self._tensor(rows.context_lens),
            page_tables=self._tensor(rows.page_tables),
            num_decodes=rows.num_decodes,
            query_starts_host=rows.query_starts.tolist(),
            context_lens_host=rows.context_lens.tolist(),
            page_size=self._page_size,
        )

    def fill_tokens(self, inputs: StepInputs, rows: Rows) -> None:
        """First stage: the decode rows read the token that was sampled for their slot."""
        if rows.num_decodes:
            slots = self._tensor(rows.slots[: rows.num_decodes])
            inputs.token_ids[: rows.num_decodes] = self._last_tokens[slots]

    def keep_tokens(self, slots: NDArray[np.int64], tokens: Tensor) -> None:
        """First stage: tokens [R] were sampled for `slots`."""
        self._last_tokens[self._tensor(slots)] = tokens

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
