"""Counting and timing the matrix products of a load."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from serving.config.model import ModelConfig
from serving.kernels.matmul_time import matrix_product_seconds, products_of_load

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def test_rows_of_a_load_are_counted() -> None:
    layers, head = products_of_load([(10, 3), (5, 1), (6, 2)], max_num_batched_tokens=8)
    assert layers == {8: 2, 5: 1, 2: 1, 1: 1}
    assert head == {3: 1, 2: 1, 1: 1}
    layers, _ = products_of_load([(8, 1)], max_num_batched_tokens=8)
    assert layers == {8: 1}


def test_every_token_passes_the_layers_once() -> None:
    load = [(128, 64)] * 16
    layers, head = products_of_load(load)
    assert sum(rows * count for rows, count in layers.items()) == 16 * (128 + 63)
    assert sum(rows * count for rows, count in head.items()) == 16 * 64


def test_seconds_are_positive(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    config = ModelConfig.from_folder(tmp_path)
    assert matrix_product_seconds(config, [(8, 2)], torch.float32) > 0
