"""Weights into layers: from safetensors, or random ones from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch

from serving.errors import ModelError
from serving.weights.checkpoint import Checkpoint
from serving.weights.dummy import DummyWeights
from serving.weights.progress import LoadProgress, ProgressMeter
from serving.weights.slots import Region, WeightSlot

__all__ = ["LoadFormat", "LoadProgress", "Loadable", "Region", "WeightSlot", "load_weights"]

LoadFormat = Literal["auto", "dummy"]


class Loadable(Protocol):
    """A layer that takes weights: it allocates on `slots`, and packs them on `ready`."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor it wants, by its name in the checkpoint, in the checkpoint's shape."""

    def regions(self) -> dict[str, Region]:
        """What it holds of the tensors that it does not hold whole."""

    def slots(self) -> list[WeightSlot]:
        """Allocate the weights and say where each tensor goes."""

    def ready(self) -> None:
        """Called once every slot is filled."""


def load_weights(
    parts: Iterable[Loadable],
    folder: Path,
    *,
    load_format: LoadFormat,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[LoadProgress], None] | None = None,
) -> None:
    """Fill every part, one after the other, so that only one exists twice at any time.

    Names and shapes of all parts are checked before the first byte is read. Raises ModelError for
    a missing, damaged or unfitting file.
    """
    parts = list(parts)
    item = torch.empty((), dtype=dtype).element_size()
    if load_format == "dummy":
        dummy = DummyWeights(seed, device)
        total = sum(_elements(held) * item for part in parts for _, _, held in _wanted(part))
        meter = ProgressMeter(total, progress)
        for part in parts:
            for slot in part.slots():
                dummy.fill(slot)
                meter.add(slot.into.numel() * item)
            part.ready()
        return
    with Checkpoint(folder) as checkpoint:
        total = 0
        for part in parts:
            for name, shape, held in _wanted(part):
                info = checkpoint.info(name)
                if info.shape != shape:
                    raise ModelError(
                        f"{info.file}: tensor {name} has shape {list(info.shape)} where "
                        f"config.json asks for {list(shape)}; the two belong to different models."
                    )
                total += info.num_bytes * _elements(held) // _elements(shape)
        meter = ProgressMeter(total, progress)
        for part in parts:
            for slot in part.slots():
                info = checkpoint.info(slot.name)
                if slot.region is None:
                    slot.load(checkpoint.read(slot.name))
                    meter.add(info.num_bytes)
                elif slot.into.numel():
                    slot.load(checkpoint.read_region(slot.name, slot.region))
                    meter.add(info.num_bytes * slot.into.numel() // _elements(slot.shape))
            part.ready()


def _wanted(part: Loadable) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, shape in the checkpoint and shape of what is held, of every tensor of a layer."""
    regions = part.regions()
    return [
        (name, shape, tuple(map(len, regions[name])) if name in regions else shape)
        for name, shape in part.shapes().items()
    ]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
