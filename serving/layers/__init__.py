"""Layers shared by the model families; each knows which tensors of a checkpoint it wants."""

from serving.layers.attention import Attention
from serving.layers.decoder import DecoderLayer
from serving.layers.embedding import Embedding
from serving.layers.head import Head
from serving.layers.linear import Linear
from serving.layers.mlp import GatedMLP
from serving.layers.norm import RMSNorm
from serving.layers.place import Place
from serving.layers.rope import inverse_frequencies, rotary_table

__all__ = [
    "Attention",
    "DecoderLayer",
    "Embedding",
    "GatedMLP",
    "Head",
    "Linear",
    "Place",
    "RMSNorm",
    "inverse_frequencies",
    "rotary_table",
]
