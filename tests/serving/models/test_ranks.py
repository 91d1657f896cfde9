"""Ranks that share out every layer give what one rank gives: all families, and odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving import kernels
from serving.config.model import ModelConfig
from serving.transport.tensor_group import TensorGroup
from tests.serving.paged import PagedRun
from tests.serving.ranks import run_ranks
from tests.serving.tiny import load_reference, make_checkpoint

#: family, number of ranks, bounds of stages, and what differs from the family's usual sizes.
VARIANTS: dict[str, tuple[str, int, tuple[int, ...], dict[str, Any]]] = {
    "llama": ("llama", 2, (0, 4), {}),
    "llama-every-bias": ("llama", 2, (0, 4), {"attention_bias": True, "mlp_bias": True}),
    "llama-vocabulary-not-divisible": ("llama", 2, (0, 2, 4), {"vocab_size": 323}),
    "llama-tied-over-stages": (
        "llama", 2, (0, 1, 4), {"tie_word_embeddings": True, "vocab_size": 331},
    ),
    "llama-a-rank-without-tokens": (
        "llama", 3, (0, 4),
        {
            "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2,
            "num_key_value_heads": 6, "intermediate_size": 96,
        },
    ),
    "qwen2-tied-one-key-head": ("qwen2", 2, (0, 4), {"num_attention_heads": 4}),
    "qwen2-untied-more-ranks-than-key-heads": (
        "qwen2", 4, (0, 4),
        {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "qwen3-norms-of-heads": (
        "qwen3", 2, (0, 4), {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "mistral-window": ("mistral", 2, (0, 2, 4), {}),
}  # fmt: skip


def _prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(0, 256, (length,), generator=generator)]


def _logits(run: PagedRun, prompt: list[int]) -> Tensor:
    """Two chunks, then three decodes."""
    table = run.new_table(len(prompt))
    ends = [20, len(prompt) - 3, *range(len(prompt) - 2, len(prompt) + 1)]
    starts = [0, *ends[:-1]]
    parts = [
        run.step([prompt[start:end]], [end], [table]).clone()
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, ranks, bounds, overrides = VARIANTS[variant]
    make_checkpoint(tmp_path, family, **overrides)
    config = ModelConfig.from_folder(tmp_path)
    prompt = [token % config.vocab_size for token in _prompt(60)]
    with torch.no_grad():
        expected = load_reference(tmp_path)(torch.tensor([prompt])).logits[0]

    def work(group: TensorGroup) -> Tensor:
        return _logits(PagedRun(config, bounds, group=group), prompt)

    results = run_ranks(ranks, tmp_path, work)
    for logits in results:
        assert logits.shape == (60, config.vocab_size)
        # Every rank samples for itself, so all must see the same bits.
        assert torch.equal(logits, results[0])
    torch.testing.assert_close(results[0], expected, atol=3e-4, rtol=1e-4)


def test_dummy_weights_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", vocab_size=323, num_attention_heads=4, num_key_value_heads=2)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    config = ModelConfig.from_folder(tmp_path)
    prompt = _prompt(40)
    expected = _logits(PagedRun(config, load_format="dummy"), prompt)

    def work(group: TensorGroup) -> Tensor:
        return _logits(PagedRun(config, load_format="dummy", group=group), prompt)

    for logits in run_ranks(2, tmp_path, work):
        torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.std()), rtol=1e-4)


def test_bfloat16_runs_layer_by_layer(tmp_path: Path) -> None:
    """The native code for whole stages cannot meet other ranks inside a layer."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 128}
    make_checkpoint(
        tmp_path, "qwen2", num_key_value_heads=2, dtype=torch.bfloat16, vocab_size=323, **sizes
    )
    config = ModelConfig.from_folder(tmp_path)
    prompt = _prompt(50)
    with torch.no_grad():
        exact = load_reference(tmp_path)(torch.tensor([prompt])).logits[0]
    whole = PagedRun(config, dtype=torch.bfloat16)
    assert whole.stages[0].fused == (kernels.native() is not None)

    def work(group: TensorGroup) -> Tensor:
        run = PagedRun(config, dtype=torch.bfloat16, group=group)
        assert not run.stages[0].fused
        assert run.stages[0].attention_name == whole.stages[0].attention_name
        return _logits(run, prompt)

    first, second = run_ranks(2, tmp_path, work)
    assert torch.equal(first, second)
    error = (_logits(whole, prompt) - exact).abs().mean()
    assert (first - exact).abs().mean() < 1.5 * error
