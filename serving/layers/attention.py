"""Grouped-query self-attention with rotary positions over the paged KV cache."""

from __future__ import annotations

from torch import Tensor

from serving import kernels
from serving.attention import StepInputs
from serving.layers.linear import Linear
from serving.layers.norm import RMSNorm
from serving.layers.place import Place
from serving.layers.share import share

__all__ = ["Attention"]


class Attention:
    """q, k and v in one product; optional norms of each query and key head (Qwen3).

    A rank of a tensor-parallel stage has a part of the query heads and the key-value heads that
    these read.

    `name` is the checkpoint's, such as `model.layers.3.self_attn`; `layer` the number in the
    whole model.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        sliding_window: int | None,
        place: Place,
        qk_norm_eps: float | None = None,
    ) -> None:
        self._layer, self._backend = layer, place.attention
        self._heads, self._kv_heads = len(share(num_heads, place)), len(share(num_kv_heads, place))
        self._dim = head_dim
        self.sliding_window, self._scale = sliding_window, head_dim**-0.5
        self._q_end = self._heads * head_dim
        self._k_end = self._q_end + self._kv_heads * head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        parts = [
            (f"{name}.q_proj", q_size),
            (f"{name}.k_proj", kv_size),
            (f"{name}.v_proj", kv_size),
        ]
        self.qkv = Linear(
            parts, hidden_size, bias=qkv_bias, split="column", place=place, unit=head_dim
        )
        self.output = Linear(
            [(f"{name}.o_proj", hidden_size)],
            q_size,
            bias=output_bias,
            split="row",
            place=place,
            unit=head_dim,
        )
        self.leaves: list[Linear | RMSNorm] = [self.qkv, self.output]
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, qk_norm_eps, place)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, qk_norm_eps, place)
            self.leaves += [self.q_norm, self.k_norm]

    def __call__(self, x: Tensor, inputs: StepInputs, kv: Tensor, cos_sin: Tensor) -> Tensor:
        """x: [T, hidden]; kv: this layer's pages, written in place; cos_sin: the rotary table."""
        tokens = x.shape[0]
        qkv = self.qkv(x)
        q = kernels.rotary_and_write_kv(
            qkv[:, : self._q_end].view(tokens, self._heads, self._dim),
            qkv[:, self._q_end : self._k_end].view(tokens, self._kv_heads, self._dim),
            qkv[:, self._k_end :].view(tokens, self._kv_heads, self._dim),
            cos_sin,
            inputs.positions,
            kv,
            inputs.slot_mapping,
            inputs.page_size,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=1e-6 if self.q_norm is None else self.q_norm.eps,
        )
        attended = self._backend.forward(
            q, kv, inputs, scale=self._scale, sliding_window=self.sliding_window, layer=self._layer
        )
        return self.output(attended.view(tokens, self._q_end))
