"""A weight matrix held once, in the layout its machine multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PackedLinear", "pack_linear"]


class PackedLinear:
    """`y = x @ weight.T + bias` for a weight [N, K]; call it with x [M, K] to get [M, N].

    `rows(ids)` reads rows of the weight back, which lets a tied embedding share this one copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = bias
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K] -> [M, N] in x's dtype."""
        return functional.linear(x, self._weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight. ids: [T] integers -> [T, K]."""
        return functional.embedding(ids, self._weight)

    @property
    def nbytes(self) -> int:
        """Bytes the weight takes in memory."""
        return self._weight.numel() * self._weight.element_size()


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Take over a weight [N, K] (and bias [N]); drop the original afterwards to hold it once."""
    if weight.dim() != 2:
        raise ValueError(f"a weight matrix has two dimensions, this one {tuple(weight.shape)}")
    return PackedLinear(weight, bias)
