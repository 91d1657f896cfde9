"""Where a stage's layers live and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from serving.attention import AttentionBackend

if TYPE_CHECKING:
    from serving.transport.tensor_group import TensorGroup

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Device and dtype of a stage's weights, its attention backend, and the ranks it consists of.

    `group` is None where one rank holds every layer whole.
    """

    dtype: torch.dtype
    device: torch.device
    attention: AttentionBackend
    group: TensorGroup | None = None

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return 0 if self.group is None else self.group.rank

    @property
    def ranks(self) -> int:
        """How many share each layer."""
        return 1 if self.group is None else self.group.size
