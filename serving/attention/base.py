"""What one step of a stage works on, and the contract of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["AttentionBackend", "StepInputs"]


@dataclass
class StepInputs:
    """One micro-batch on a stage: S sequences with T new tokens in all, decode rows first.

    ```
    sequences      | d0 | d1 |  p0: 3 tokens  | p1: 2 tokens |
    rows of T      |  0 |  1 |  2    3    4   |  5    6      |     num_decodes = 2
    query_starts     0    1     2                5             7
    ```

    All tensors lie on the stage's device. Page numbers beyond what `context_lens` needs may be
    anything, also negative. The lists are host copies, so that no step waits for the device; they
    are empty where a step is recorded once and run many times with tensors that change (the
    `attention_plan` is given then). Integers on a GPU may be int32 where int64 is named.
    """

    token_ids: Tensor
    """[T] int64; read by the first stage only."""
    positions: Tensor
    """[T] int64, the place of each token in its sequence, from 0."""
    slot_mapping: Tensor
    """[T] int64: page * page_size + offset where this token's keys and values go."""
    query_starts: Tensor
    """[S + 1] int32."""
    context_lens: Tensor
    """[S] int32: keys of each sequence, these new tokens included."""
    page_tables: Tensor
    """[S, max_pages] int32."""
    num_decodes: int
    """The first this many sequences have one new token each."""
    query_starts_host: list[int]
    context_lens_host: list[int]
    page_size: int
    table_rows: Tensor | None = None
    """[S] int32: the row of `page_tables` with each sequence's pages; None: its own number."""
    attention_plan: Any = field(default=None, repr=False)
    """What a backend lays out once for all layers; a backend makes it itself if it is None."""


class AttentionBackend(ABC):
    """Causal attention over paged keys and values; one instance serves every layer of a stage.

    The KV tensor of a layer is [pages, 2, page_size, kv_heads, head_dim], keys at index 0. What
    slots outside a sequence hold, be it NaN, never reaches its result.
    """

    name: ClassVar[str]

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        inputs: StepInputs,
        *,
        scale: float,
        sliding_window: int | None,
        layer: int,
    ) -> Tensor:
        """Attend each new token to its sequence's keys up to itself.

        q: [T, Hq, D], already rotated; kv already holds the new tokens' keys and values. With a
        window of w a token sees itself and the w - 1 keys before it. Returns [T, Hq, D], the
        dtype of q. `layer` is the layer's number in the whole model.
        """

    def write_kv(self, k: Tensor, v: Tensor, kv: Tensor, inputs: StepInputs) -> None:
        """Write the new tokens' keys and values [T, Hkv, D] to their slots, in place.

        Layers write through `serving.kernels.rotary_and_write_kv`, which also rotates; this is
        the plain form, for keys that are ready.
        """
        pages = inputs.slot_mapping // inputs.page_size
        offsets = inputs.slot_mapping % inputs.page_size
        kv[pages, 0, offsets] = k.to(kv.dtype)
        kv[pages, 1, offsets] = v.to(kv.dtype)
