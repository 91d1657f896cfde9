"""One pre-norm decoder layer, put together by each family's file."""

from __future__ import annotations

from torch import Tensor

from serving import kernels
from serving.attention import StepInputs
from serving.layers.attention import Attention
from serving.layers.mlp import GatedMLP
from serving.layers.norm import RMSNorm
from serving.weights import Loadable

__all__ = ["DecoderLayer"]


class DecoderLayer:
    """`h = x + attention(norm(x)); y = h + mlp(norm(h))`.

    The last addition of a layer is left to the next one, which does it together with its norm;
    so a layer takes and returns a pair (delta, residual) whose sum is the hidden state.
    """

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: GatedMLP
    ) -> None:
        self._attention_norm, self._attention = attention_norm, attention
        self._mlp_norm, self._mlp = mlp_norm, mlp
        self.leaves: list[Loadable] = [attention_norm, *attention.leaves, mlp_norm, *mlp.leaves]

    def fused_weights(self) -> kernels.DecoderWeights:
        """The loaded weights, for a kernel that runs whole layers."""
        attention, mlp = self._attention, self._mlp
        return kernels.DecoderWeights(
            input_norm=self._attention_norm.weight,
            qkv=attention.qkv.packed,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            output=attention.output.packed,
            post_norm=self._mlp_norm.weight,
            gate_up=mlp.gate_up.packed,
            down=mlp.down.packed,
            sliding_window=attention.sliding_window,
        )

    def __call__(
        self,
        delta: Tensor | None,
        residual: Tensor,
        inputs: StepInputs,
        kv: Tensor,
        cos_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """delta (None on a stage's first layer), residual: [T, hidden] each."""
        if delta is None:
            x = self._attention_norm(residual)
        else:
            x, residual = self._attention_norm.add(delta, residual)
        x = self._attention(x, inputs, kv, cos_sin)
        x, residual = self._mlp_norm.add(x, residual)
        return self._mlp(x), residual
