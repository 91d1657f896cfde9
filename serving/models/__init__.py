"""The model families, and how a stage of one is built with its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from serving.attention import choose_attention
from serving.config.model import Family, ModelConfig
from serving.layers import DecoderLayer, Place
from serving.models.llama import llama_layer
from serving.models.mistral import mistral_layer
from serving.models.qwen2 import qwen2_layer
from serving.models.qwen3 import qwen3_layer
from serving.models.stage import StageModel
from serving.weights import LoadFormat, LoadProgress, load_weights

if TYPE_CHECKING:
    from serving.transport.tensor_group import TensorGroup

__all__ = ["StageModel", "build_stage"]

_LAYERS: dict[Family, Callable[[ModelConfig, int, Place], DecoderLayer]] = {
    "llama": llama_layer,
    "mistral": mistral_layer,
    "qwen2": qwen2_layer,
    "qwen3": qwen3_layer,
}


def build_stage(
    config: ModelConfig,
    resident: range,
    *,
    first: bool,
    last: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: Callable[[LoadProgress], None] | None = None,
    max_positions: int | None = None,
    group: TensorGroup | None = None,
) -> StageModel:
    """Build layers `resident` of a model and load their weights, and theirs only.

    With a `group` of more ranks than one, what this rank holds of them; `config` is the model's.
    `max_positions` bounds the positions that will occur (default: the model's context length);
    `progress` is told of loading now and then. `load_format` "dummy" needs no weight files and
    gives each tensor the same values whatever the split. Raises ModelError.
    """
    device = torch.device(device)
    place = Place(dtype, device, choose_attention(device, dtype), group)
    model = StageModel(
        config,
        resident,
        [_LAYERS[config.family](config, layer, place) for layer in resident],
        place,
        first=first,
        last=last,
        max_positions=max_positions or config.context_length,
    )
    load_weights(
        model.leaves,
        config.folder,
        load_format=load_format,
        seed=seed,
        dtype=dtype,
        device=place.device,
        progress=progress,
    )
    model.fuse()
    return model
