"""Copies from host to device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["upload"]


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, behind what was launched before; on the CPU it shares memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
