"""Frequencies of every RoPE kind against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from serving.config.rope import read_rope
from serving.layers.rope import inverse_frequencies, rotary_table


def _both(rope: dict[str, Any], head_dim: int) -> tuple[torch.Tensor, float, Any]:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=dict(rope),
    )
    ours, factor = inverse_frequencies(
        read_rope({"rope_parameters": rope}, 4096, "config.json"), head_dim
    )
    return ours, factor, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 1024,
            "beta_fast": 24,
            "beta_slow": 3,
            "truncate": False,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.3},
    ],
)
def test_frequencies_equal_transformers(rope: dict[str, Any], head_dim: int) -> None:
    ours, factor, theirs = _both(rope, head_dim)
    assert torch.equal(ours, theirs.inv_freq)
    assert factor == theirs.attention_scaling


@settings(max_examples=40, deadline=None)
@given(
    theta=st.floats(1e3, 1e7),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    width=st.floats(0.1, 6.0),
    original=st.integers(64, 16384),
)
def test_llama3_frequencies_equal_transformers(
    theta: float, factor: float, low: float, width: float, original: int
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + width,
        "original_max_position_embeddings": original,
    }
    ours, _, theirs = _both(rope, 64)
    assert torch.equal(ours, theirs.inv_freq)


def test_the_table_holds_cosines_then_sines() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    _, _, theirs = _both(rope, 32)
    table = rotary_table(
        read_rope({"rope_parameters": rope}, 4096, "x"), 32, 50, torch.device("cpu")
    )
    cos, sin = theirs(torch.zeros(1), torch.arange(50).unsqueeze(0))
    torch.testing.assert_close(table[:, :16], cos[0, :, :16], atol=1e-6, rtol=0)
    torch.testing.assert_close(table[:, 16:], sin[0, :, 16:], atol=1e-6, rtol=0)
