"""The ranks of one tensor-parallel stage: sums and gatherings that all of them take part in.

Import this module only where a stage has more than one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.gloo import loopback_links

__all__ = ["GlooTensorGroup", "TensorGroup", "connect_ranks"]

# The type stubs of torch know only a part of what is used here.
dist: Any = torch.distributed


class TensorGroup(ABC):
    """One rank's view of its group.

    Every rank makes the same calls in the same order, with tensors of the same shape and dtype,
    and all ranks get the same bits. On a GPU calls are launched on the current stream, also while
    it is being recorded, and do not wait.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by the sum over all ranks, in place."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """[R, n] of every rank -> [R, size * n], side by side in the order of ranks."""

    @abstractmethod
    def warm_up(self) -> None:
        """Use every way once, so that no step pays for a connection."""


class GlooTensorGroup(TensorGroup):
    """Between processes of one host, on the loopback interface only.

    Waiting ends with EngineDeadError when another rank dies.
    """

    def __init__(self, store: Any, stage: int, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._stage = stage
        self._links = loopback_links(store, "ranks", rank, size)

    def all_reduce(self, tensor: Tensor) -> None:
        self._finish(self._links.allreduce([tensor]))

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._finish(self._links.allgather([parts], [tensor]))
        return torch.cat(parts, dim=-1)

    def warm_up(self) -> None:
        self.all_reduce(torch.zeros(1))
        self.all_gather(torch.zeros(1, 1))

    def _finish(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise EngineDeadError(
                f"the link between the ranks of stage {self._stage} broke"
            ) from error


def connect_ranks(
    directory: str, stage: int, rank: int, size: int, device: torch.device
) -> TensorGroup:
    """Meet the other ranks of a stage in the group's directory and use the links once.

    Returns when all ranks are there. Raises ConfigError where a GPU's library is missing.
    """
    store = dist.FileStore(f"{directory}/ranks-{stage}", size)
    group: TensorGroup
    if device.type == "cuda":
        from serving.transport.nccl_group import NcclTensorGroup

        group = NcclTensorGroup(store, stage, rank, size, device)
    else:
        group = GlooTensorGroup(store, stage, rank, size)
    group.warm_up()
    return group
