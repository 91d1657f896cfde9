"""Mistral: no biases, the same sliding window in every layer."""

from __future__ import annotations

from serving.config.model import ModelConfig
from serving.layers import Attention, DecoderLayer, GatedMLP, Place, RMSNorm

__all__ = ["mistral_layer"]


def mistral_layer(config: ModelConfig, layer: int, place: Place) -> DecoderLayer:
    """Layer number `layer` of the whole model."""
    name, hidden, eps = f"model.layers.{layer}", config.hidden_size, config.rms_norm_eps
    attention = Attention(
        f"{name}.self_attn",
        layer,
        hidden_size=hidden,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qkv_bias=False,
        output_bias=False,
        sliding_window=config.sliding_window(layer),
        place=place,
    )
    return DecoderLayer(
        RMSNorm(f"{name}.input_layernorm", hidden, eps, place),
        attention,
        RMSNorm(f"{name}.post_attention_layernorm", hidden, eps, place),
        GatedMLP(f"{name}.mlp", hidden, config.intermediate_size, bias=False, place=place),
    )
