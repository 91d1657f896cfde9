"""From logits to tokens on the CPU: a native pass over the logits, or softmax and inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.kernels.library import native

__all__ = ["native_draw"]


def native_draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor | None:
    """Tokens [R] int64 in the order of the vocabulary's cumulative distribution.

    logits: [R, V] float32; temperature: [R] float32, above 0; uniform: [R] float64 in (0, 1).
    A row's token depends on nothing but the row. None where this machine has no native kernels or
    the logits are not on the CPU.
    """
    library = native() if logits.device.type == "cpu" else None
    if library is None or logits.dtype is not torch.float32:
        return None
    logits = logits.contiguous()
    by = temperature.float().reciprocal()
    uniform = uniform.double().contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    library.lectern_draw(
        logits.data_ptr(), rows, vocab, by.data_ptr(), uniform.data_ptr(), tokens.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return tokens
