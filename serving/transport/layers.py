"""Links of their own for KV of layers that move: activations and tokens never wait behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.distributed
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.gloo import loopback_links

# The type stubs of torch know only a part of what is used here.
dist: Any = torch.distributed

_KV = 1


class LayerLinks(ABC):
    """From every stage to every other. One thread may send while another one receives."""

    @abstractmethod
    def send(self, rows: Tensor, stage: int) -> None:
        """Send a contiguous tensor; returns when it may be written again."""

    @abstractmethod
    def receive(self, rows: Tensor, stage: int) -> None:
        """Fill a contiguous tensor with the next one that `stage` sends, of the same size."""


class GlooLayerLinks(LayerLinks):
    """Over the loopback interface. `rendezvous` is a file that all stages of the group share.

    Waiting ends with EngineDeadError when the other side dies.
    """

    def __init__(self, stage: int, stages: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, stages)
        self._links = loopback_links(store, "layers", stage, stages)

    def send(self, rows: Tensor, stage: int) -> None:
        self._wait(self._links.send([rows], stage, _KV), stage)

    def receive(self, rows: Tensor, stage: int) -> None:
        self._wait(self._links.recv([rows], stage, _KV), stage)

    def _wait(self, work: Any, stage: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise EngineDeadError(
                f"the link to stage {stage} on which layers move broke"
            ) from error
