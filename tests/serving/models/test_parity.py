"""Every family against transformers: logits, greedy tokens, chunks, batches, stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serving import kernels
from serving.config.model import ModelConfig
from tests.serving.paged import PagedRun
from tests.serving.tiny import (
    FAMILIES,
    LLAMA3_ROPE,
    YARN_ROPE,
    linear_rope,
    load_reference,
    make_checkpoint,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": linear_rope(3.0)}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-yarn": (
        "qwen3",
        {
            "rope_parameters": {
                **YARN_ROPE,
                "attention_factor": 0.9,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            }
        },
    ),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "mistral-yarn": ("mistral", {"rope_parameters": {**YARN_ROPE, "truncate": False}}),
    "mistral-narrow": ("mistral", {"sliding_window": 3}),
}


def _prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(0, 256, (length,), generator=generator)]


def _reference_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    make_checkpoint(tmp_path, family, **overrides)
    reference = load_reference(tmp_path)
    run = PagedRun(ModelConfig.from_folder(tmp_path))
    prompt = _prompt(150)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0]
    table = run.new_table(len(prompt))
    parts = [run.step([prompt[start:end]], [end], [table]) for start, end in [(0, 37), (37, 130)]]
    parts += [run.step([[prompt[at]]], [at + 1], [table]) for at in range(130, 150)]
    torch.testing.assert_close(torch.cat(parts), expected, atol=2e-4, rtol=1e-4)

    wanted = _reference_greedy(reference, prompt[:60], 24)
    assert len(set(wanted)) > 5, "the checkpoint repeats itself and would prove little"
    assert run.greedy(prompt[:60], 24, chunk=16) == wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 3, 4)])
def test_stages_give_what_one_stage_gives(
    family: str, bounds: tuple[int, ...], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, family, max_shard_size="60KB")
    config = ModelConfig.from_folder(tmp_path)
    prompt = _prompt(50)
    whole, split = PagedRun(config), PagedRun(config, bounds)
    table, other = whole.new_table(50), split.new_table(50)
    assert torch.equal(whole.step([prompt], [50], [table]), split.step([prompt], [50], [other]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_each_sequence_its_own(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    config = ModelConfig.from_folder(tmp_path)
    run, alone = PagedRun(config), PagedRun(config)
    first, second, third, fourth = (_prompt(n, seed) for seed, n in enumerate((70, 5, 90, 33)))
    tables = [run.new_table(100) for _ in range(4)]
    run.step([first[:69], second[:4], third[:50]], [69, 4, 50], tables[:3])
    # Two decodes, the rest of a prompt, and a new prompt.
    logits = run.step([first[69:], second[4:], third[50:], fourth], [70, 5, 90, 33], tables)
    rows = [0, 1, 1 + 40, 1 + 40 + 33]
    for row, prompt in zip(rows, (first, second, third, fourth), strict=True):
        expected = alone.step([prompt], [len(prompt)], [alone.new_table(100)])[-1]
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_worse_than_transformers(
    family: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean error against float32, beside that of transformers in bfloat16."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    make_checkpoint(
        tmp_path,
        family,
        intermediate_size=128,
        num_key_value_heads=2,
        dtype=torch.bfloat16,
        **sizes,
    )
    if not native:
        monkeypatch.setattr("serving.kernels.native_stage", lambda *a, **k: None)
    run = PagedRun(ModelConfig.from_folder(tmp_path), dtype=torch.bfloat16)
    assert native or not run.stages[0].fused
    prompt = _prompt(100)
    table = run.new_table(100)
    ours = torch.cat(
        [run.step([prompt[:60]], [60], [table]), run.step([prompt[60:]], [100], [table])]
    )
    with torch.no_grad():
        exact = load_reference(tmp_path)(torch.tensor([prompt])).logits[0]
        theirs = load_reference(tmp_path, torch.bfloat16)(torch.tensor([prompt])).logits[0]
    assert ours.dtype is torch.float32
    error, their_error = (ours - exact).abs().mean(), (theirs.float() - exact).abs().mean()
    assert error < 1.25 * their_error


def test_dummy_weights_do_not_depend_on_the_split(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    config = ModelConfig.from_folder(tmp_path)
    prompt = _prompt(20)
    results = []
    for bounds in ((0, 4), (0, 1, 4), (0, 2, 3, 4)):
        run = PagedRun(config, bounds, load_format="dummy")
        results.append(run.step([prompt], [20], [run.new_table(20)]))
    assert results[0].std() > 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_float16_is_accepted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", dtype=torch.float16)
    config = ModelConfig.from_folder(tmp_path)
    assert config.dtype == "float16"
    run = PagedRun(config, dtype=torch.float16)
    prompt = _prompt(30)
    logits = run.step([prompt], [30], [run.new_table(30)])
    with torch.no_grad():
        exact = load_reference(tmp_path)(torch.tensor([prompt])).logits[0]
    assert (logits - exact).abs().mean() < 0.05 * exact.std()


def test_only_the_ends_of_the_pipeline_hold_the_vocabulary(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    config = ModelConfig.from_folder(tmp_path)
    names = [
        {name for leaf in stage.leaves for name in leaf.shapes()}
        for stage in PagedRun(config, (0, 1, 3, 4)).stages
    ]
    assert "model.embed_tokens.weight" in names[0]
    assert "lm_head.weight" in names[2]
    assert all("layers" in name for name in names[1])
    assert not names[0] & names[1]
    assert not names[1] & names[2]


def test_a_middle_stage_has_neither_embedding_nor_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    middle = PagedRun(ModelConfig.from_folder(tmp_path), (0, 1, 3, 4)).stages[1]
    with pytest.raises(ValueError, match="last stage"):
        middle.logits(torch.zeros(1, 48))


def test_native_code_runs_whole_stages_where_it_can(tmp_path: Path) -> None:
    if kernels.native() is None:
        pytest.skip("this machine runs no native kernels (needs a compiler and AVX-512 bf16)")
    make_checkpoint(tmp_path, "llama", head_dim=32, dtype=torch.bfloat16)
    config = ModelConfig.from_folder(tmp_path)
    assert not PagedRun(config).stages[0].fused, "float32 goes through torch"
    sized = PagedRun(config, dtype=torch.bfloat16)
    assert sized.stages[0].attention_name == "kernel"
