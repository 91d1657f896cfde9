"""What is read from config.json in either spelling, and what is refused with which sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.config.model import ModelConfig
from serving.config.rope import RopeConfig
from serving.errors import ModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def write(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    raw = {**LLAMA, **(values or {}), **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def read(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.from_folder(write(folder, values, **changes))


def as_family(family: str) -> dict[str, Any]:
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    return {"architectures": [f"{names[family]}ForCausalLM"], "model_type": family}


def test_sizes_and_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.family == "llama"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 8, 2)
    assert config.head_dim == 8
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.sliding_windows == (None,) * 4
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1
    assert config.dtype == "float32"
    assert not config.tie_word_embeddings
    assert config.kv_shape(10, 16) == (10, 2, 16, 2, 8)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000, "factor": 4.0}},
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, spelling).rope == RopeConfig(theta=5e5, kind="linear", factor=4.0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_dtype(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, {key: "bfloat16"}).dtype == "bfloat16"


def test_llama3_and_yarn(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    rope = read(tmp_path, rope_scaling=llama3).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("llama3", 8.0, 512)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = read(tmp_path, rope_scaling=yarn)
    assert config.rope.kind == "yarn"
    assert config.context_length == 8192
    assert read(tmp_path, rope_scaling={"type": "yarn", "factor": 2.0}).context_length == 4096


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("mistral", {"sliding_window": 9}, (9,) * 4),
        ("qwen2", {"sliding_window": 9}, (None,) * 4),
        (
            "qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 9),
        ),
        (
            "qwen3",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, None, 9, None),
        ),
        ("llama", {"sliding_window": None}, (None,) * 4),
    ],
)
def test_sliding_windows(
    tmp_path: Path, family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, {**as_family(family), **changes}).sliding_windows == windows


@pytest.mark.parametrize(
    ("family", "bias", "expected"),
    [
        ("llama", True, (True, True, False)),
        ("llama", False, (False, False, False)),
        ("qwen2", False, (True, False, False)),
        ("qwen3", True, (True, True, True)),
        ("mistral", True, (False, False, False)),
    ],
)
def test_biases_and_head_norms(
    tmp_path: Path, family: str, bias: bool, expected: tuple[bool, ...]
) -> None:
    config = read(tmp_path, as_family(family), attention_bias=bias)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == expected


def test_stop_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=[7, 9, 7]).eos_token_ids == (7, 9)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert read(tmp_path, as_family("qwen3")).eos_token_ids == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (7,)


def test_the_model_type_serves_without_architectures(tmp_path: Path) -> None:
    assert read(tmp_path, architectures=None, model_type="qwen2").family == "qwen2"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
    "model type": ({"architectures": None, "model_type": "bert"}, "bert.*Qwen3ForCausalLM"),
    "nothing named": ({"architectures": None, "model_type": None}, "neither"),
    "mixture": ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM.*supported are"),
    "experts": ({"num_local_experts": 8}, "mixture-of-experts"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised.*awq"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "rope kind": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*yarn"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope text": ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor must be a number"),
    "rope list": ({"rope_scaling": [1]}, "must be an object"),
    "rope bands": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
            }
        },
        "low_freq_factor",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "theta": ({"rope_theta": 0}, "rope_theta"),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "wrong size": ({"num_hidden_layers": "many"}, "num_hidden_layers must be a number"),
    "zero": ({"vocab_size": 0}, "vocab_size must be at least 1"),
    "fraction": ({"vocab_size": 10.5}, "vocab_size must be a whole number"),
    "heads": ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
    "no head_dim": ({"hidden_size": 60}, "not a multiple"),
    "odd head": ({"head_dim": 7}, "odd"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    "window in llama": ({"sliding_window": 128}, "sliding-window"),
    "chunked": ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    "few layer types": ({"layer_types": ["full_attention"]}, "layer_types"),
    "window without size": (
        {**as_family("qwen2"), "layer_types": ["sliding_attention"] * 4},
        "use_sliding_window",
    ),
    "eos": ({"eos_token_id": "two"}, "eos_token_id"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    changes, sentence = REFUSED[case]
    with pytest.raises(ModelError, match=sentence) as refused:
        read(tmp_path, changes)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        ModelConfig.from_folder(empty)
    (empty / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        ModelConfig.from_folder(empty)
    with pytest.raises(ModelError, match="GGUF file"):
        ModelConfig.from_folder(empty / "model.gguf")
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        ModelConfig.from_folder(empty)
    for broken in ("{", "[]", "\xff"):
        (empty / "config.json").write_bytes(broken.encode("latin-1"))
        with pytest.raises(ModelError, match=r"config\.json"):
            ModelConfig.from_folder(empty)
    with pytest.raises(ModelError, match="is a file"):
        ModelConfig.from_folder(empty / "config.json")
