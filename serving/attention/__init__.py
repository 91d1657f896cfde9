"""Attention backends: one contract (`base`), chosen once when a stage is built."""

from __future__ import annotations

import torch

from serving import kernels
from serving.attention.base import AttentionBackend, StepInputs
from serving.attention.kernel import KernelAttention
from serving.attention.torch_reference import TorchAttention
from serving.kernels.device import gpu_kernels

__all__ = [
    "AttentionBackend",
    "KernelAttention",
    "StepInputs",
    "TorchAttention",
    "choose_attention",
]


def choose_attention(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The fastest backend that serves this device and dtype."""
    if device.type == "cuda" and gpu_kernels() is not None:
        from serving.attention.triton_paged import TritonAttention

        return TritonAttention(device)
    if device.type == "cpu" and dtype is torch.bfloat16 and kernels.native() is not None:
        return KernelAttention()
    return TorchAttention()
