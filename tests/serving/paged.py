"""Micro-batches by hand: a model run over paged keys and values without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from serving.attention import StepInputs
from serving.config.model import ModelConfig
from serving.config.shares import rank_config
from serving.models import StageModel, build_stage
from serving.transport.tensor_group import TensorGroup

__all__ = ["PagedRun", "step_inputs"]


def step_inputs(
    chunks: Sequence[Sequence[int]],
    contexts: Sequence[int],
    tables: Sequence[Sequence[int]],
    page_size: int = 16,
) -> StepInputs:
    """Sequence s gets the new tokens chunks[s], after which it holds contexts[s] tokens.

    Sequences with one new token must come first. Page tables are padded with -1.
    """
    starts, positions, slots, ids = [0], [], [], []
    for chunk, context, table in zip(chunks, contexts, tables, strict=True):
        for position in range(context - len(chunk), context):
            positions.append(position)
            slots.append(table[position // page_size] * page_size + position % page_size)
        ids.extend(chunk)
        starts.append(len(ids))
    decodes = 0
    while decodes < len(chunks) and len(chunks[decodes]) == 1:
        decodes += 1
    width = max(len(table) for table in tables)
    return StepInputs(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        page_tables=torch.tensor(
            [[*table, *[-1] * (width - len(table))] for table in tables], dtype=torch.int32
        ),
        num_decodes=decodes,
        query_starts_host=starts,
        context_lens_host=list(contexts),
        page_size=page_size,
    )


class PagedRun:
    """A model over one or several stages with its pages; sequences have scattered page tables.

    With a `group` it is one rank of every stage, and all ranks must do the same steps.
    """

    def __init__(
        self,
        config: ModelConfig,
        bounds: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        page_size: int = 16,
        pages: int = 96,
        load_format: str = "auto",
        group: TensorGroup | None = None,
    ) -> None:
        bounds = bounds or (0, config.num_layers)
        self.config, self.page_size = config, page_size
        self.stages: list[StageModel] = []
        for first, last in pairwise(bounds):
            self.stages.append(
                build_stage(
                    config,
                    range(first, last),
                    first=first == 0,
                    last=last == config.num_layers,
                    dtype=dtype,
                    device="cpu",
                    load_format="dummy" if load_format == "dummy" else "auto",
                    group=group,
                )
            )
        own = config if group is None else rank_config(config, group.size)
        shape = own.kv_shape(pages, page_size)
        # Slots never written hold what would spoil any sum that read them unmasked.
        self.kv = [
            [torch.full(shape, torch.nan, dtype=dtype) for _ in stage.layers]
            for stage in self.stages
        ]
        numbers = torch.randperm(pages, generator=torch.Generator().manual_seed(5)).tolist()
        self._free = [int(number) for number in numbers]

    def new_table(self, tokens: int) -> list[int]:
        """Pages for a sequence of this many tokens."""
        return [self._free.pop() for _ in range(-(-tokens // self.page_size))]

    def step(
        self,
        chunks: Sequence[Sequence[int]],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> Tensor:
        """Logits [T, V] of every new token."""
        inputs = step_inputs(chunks, contexts, tables, self.page_size)
        hidden: Tensor | None = None
        for stage, kv in zip(self.stages, self.kv, strict=True):
            hidden = stage.forward(inputs, hidden, kv)
        assert hidden is not None
        # A stage's logits are valid until its next ones only; tests keep them.
        return self.stages[-1].logits(hidden).clone()

    def greedy(self, prompt: Sequence[int], count: int, chunk: int = 512) -> list[int]:
        """Greedy tokens after a prompt that is prefilled in chunks; stops at an end token."""
        table = self.new_table(len(prompt) + count)
        logits = torch.empty(0)
        for start in range(0, len(prompt), chunk):
            part = list(prompt[start : start + chunk])
            logits = self.step([part], [start + len(part)], [table])
        out = [int(logits[-1].argmax())]
        while len(out) < count and out[-1] not in self.config.eos_token_ids:
            logits = self.step([[out[-1]]], [len(prompt) + len(out)], [table])
            out.append(int(logits[-1].argmax()))
        return out
