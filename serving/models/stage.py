"""A run of layers of one model: what one pipeline stage computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving import kernels
from serving.attention import StepInputs
from serving.config.model import ModelConfig
from serving.layers import DecoderLayer, Embedding, Head, Place, RMSNorm, rotary_table
from serving.weights import Loadable

__all__ = ["StageModel"]

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"


class StageModel:
    """Layers of a model; the first stage also embeds, the last one has norm and head.

    `resident` layers are held, of which `layers` are computed: all of them at first. With tied
    embeddings a stage that is both first and last holds the matrix once, and the first and last
    stage of several hold a copy each.
    """

    def __init__(
        self,
        config: ModelConfig,
        resident: range,
        decoder_layers: Sequence[DecoderLayer],
        place: Place,
        *,
        first: bool,
        last: bool,
        max_positions: int,
    ) -> None:
        self.config, self.first, self.last = config, first, last
        self.resident = self.layers = resident
        self.dtype, self.device = place.dtype, place.device
        self.attention_name = place.attention.name
        self._resident = list(decoder_layers)
        self._head: Head | None = None
        self._norm: RMSNorm | None = None
        self._embedding: Embedding | None = None
        size, hidden = config.vocab_size, config.hidden_size
        if last:
            name = _EMBEDDING if config.tie_word_embeddings else _HEAD
            self._head = Head(name, size, hidden, place)
            self._norm = RMSNorm(_NORM, hidden, config.rms_norm_eps, place)
        if first and not (last and config.tie_word_embeddings):
            self._embedding = Embedding(_EMBEDDING, size, hidden, place)
        self._whole: kernels.NativeStage | None = None
        self._ranks = place.ranks
        self._cos_sin = rotary_table(config.rope, config.head_dim, max_positions, place.device)

    @property
    def leaves(self) -> list[Loadable]:
        """Everything that takes weights, in the order of the computation."""
        ends = [self._embedding] if self._embedding else []
        tail: list[Loadable] = []
        if self._norm is not None and self._head is not None:
            tail = [self._norm, self._head.linear]
        return [*ends, *(leaf for layer in self._resident for leaf in layer.leaves), *tail]

    def fuse(self) -> None:
        """Call once all weights are loaded: from then on the layers run as one native call, where
        the machine, the dtype and the sizes allow it. Ranks have to meet inside every layer."""
        if self._ranks > 1:
            return
        config = self.config
        self._whole = kernels.native_stage(
            [layer.fused_weights() for layer in self._resident],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )

    def compute(self, layers: range) -> None:
        """The layers that `forward` runs from now on: at least one of the resident ones."""
        if not (self.resident.start <= layers.start < layers.stop <= self.resident.stop):
            raise ValueError(f"layers {layers} are not among the resident {self.resident}")
        self.layers = layers

    @property
    def fused(self) -> bool:
        """Whether the layers run as one native call."""
        return self._whole is not None

    @torch.inference_mode()
    def forward(
        self,
        inputs: StepInputs,
        hidden: Tensor | None,
        kv: Sequence[Tensor],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch through this stage's layers.

        hidden: [T, H] from the layer before, None where tokens are embedded first; kv: one tensor a
        layer of this stage, [pages, 2, page_size, kv_heads, head_dim], written in place. Returns
        [T, H] with the residual already added, or of these only the rows `wanted` ([R] int64):
        where a stage is the last one, the rows that get a token. `hidden` is only read.
        """
        if hidden is not None:
            residual = hidden
        elif self.first:
            residual = self._embed(inputs.token_ids)
        else:
            raise ValueError("a stage after the first needs the hidden rows of the one before")
        first = self.layers.start - self.resident.start
        if self._whole is not None:
            return self._whole(
                residual,
                kv,
                self._cos_sin,
                first=first,
                positions=inputs.positions,
                slot_mapping=inputs.slot_mapping,
                query_starts=inputs.query_starts,
                context_lens=inputs.context_lens,
                page_tables=inputs.page_tables,
                page_size=inputs.page_size,
                wanted=wanted,
            )
        delta: Tensor | None = None
        own = self._resident[first : first + len(self.layers)]
        for layer, pages in zip(own, kv, strict=True):
            delta, residual = layer(delta, residual, inputs, pages, self._cos_sin)
        out = residual if delta is None else residual + delta
        return out if wanted is None else out[wanted]

    @torch.inference_mode()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Final norm and head of the rows that get a token. [R, H] -> [R, vocab] float32, the same
        bits on every rank."""
        head, norm = self._ends()
        return head.float32(norm(hidden_rows))

    @torch.inference_mode()
    def scores(self, hidden_rows: Tensor) -> Tensor:
        """As `logits`, in the stage's own dtype."""
        head, norm = self._ends()
        return head(norm(hidden_rows))

    def _ends(self) -> tuple[Head, RMSNorm]:
        if self._head is None or self._norm is None:
            raise ValueError("only the last stage has a head")
        return self._head, self._norm

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._embedding is not None:
            return self._embedding(token_ids)
        if self._head is None:
            raise ValueError("only the first stage embeds tokens")
        return self._head.rows(token_ids)
