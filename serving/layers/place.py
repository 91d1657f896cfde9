"""Where a stage's layers live and what they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serving.attention import AttentionBackend

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Device and dtype of a stage's weights, and its attention backend."""

    dtype: torch.dtype
    device: torch.device
    attention: AttentionBackend
