"""Which numbers of ranks a model can be shared out to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.bench.shapes import shape_folder
from serving.config.model import ModelConfig
from serving.config.shares import possible_ranks, rank_config
from serving.errors import ConfigError


def model(folder: Path, heads: int, kv_heads: int, width: int) -> ModelConfig:
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 16 * heads,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "possible"),
    [
        (32, 8, 1024, [1, 2, 4, 8, 16, 32]),
        (6, 2, 88, [1, 2]),
        (12, 2, 96, [1, 2, 4, 6, 12]),
        (5, 5, 88, [1]),
        (8, 4, 90, [1, 2]),
        (14, 2, 4864, [1, 2]),
    ],
)
def test_possible_numbers_of_ranks(
    heads: int, kv_heads: int, width: int, possible: list[int], tmp_path: Path
) -> None:
    whole = model(tmp_path, heads, kv_heads, width)
    assert possible_ranks(whole) == possible
    for ranks in possible:
        own = rank_config(whole, ranks)
        assert own.num_heads * ranks == heads
        assert own.intermediate_size * ranks == width
        assert own.kv_shape(3, 16) == (3, 2, 16, max(1, kv_heads // ranks), 16)
        assert own.num_heads % own.num_kv_heads == 0
        assert own.vocab_size == whole.vocab_size


def test_an_impossible_number_names_the_possible_ones(tmp_path: Path) -> None:
    whole = model(tmp_path, 8, 4, 96)
    with pytest.raises(ConfigError, match=r"to 1, 2, 4 or 8 ranks only") as error:
        rank_config(whole, 3)
    assert error.value.flag == "--tensor-parallel-size"
    assert "--tensor-parallel-size is 3" in str(error.value)
    with pytest.raises(ConfigError, match="to 1 rank only"):
        rank_config(model(tmp_path, 5, 5, 88), 2)


def test_the_shapes_of_the_benchmark_divide() -> None:
    for name in ("qwen3-0.6b", "qwen3-8b", "qwen3-32b"):
        folder = shape_folder(name)
        assert folder is not None
        assert {1, 2, 4, 8} <= set(possible_ranks(ModelConfig.from_folder(folder)))
