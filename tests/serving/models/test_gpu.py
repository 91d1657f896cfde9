"""The same stage and sampler on a GPU and on the CPU."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.attention import StepInputs
from serving.config.model import ModelConfig
from serving.core import SamplingParams
from serving.models import build_stage
from serving.sampling import Sampler
from tests.serving.paged import step_inputs

pytestmark = pytest.mark.gpu

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 3000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "use_sliding_window": True,
    "sliding_window": 20,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")


def _moved(inputs: StepInputs, device: str) -> StepInputs:
    changed = {
        field.name: getattr(inputs, field.name).to(device)
        for field in fields(inputs)
        if isinstance(getattr(inputs, field.name), Tensor)
    }
    return replace(inputs, **changed)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_stage_gives_the_same_logits(dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = ModelConfig.from_folder(tmp_path)
    results = []
    for device in ("cpu", "cuda"):
        stage = build_stage(
            config, range(3), first=True, last=True, dtype=dtype, device=device, load_format="dummy"
        )
        kv = [torch.zeros(config.kv_shape(40, 16), dtype=dtype, device=device) for _ in range(3)]
        tables = [list(range(9)), list(range(20, 30))]
        prompts = [list(range(100)), list(range(500, 630))]
        first = step_inputs([prompts[0][:50], prompts[1][:129]], [50, 129], tables)
        second = step_inputs([prompts[1][129:], prompts[0][50:]], [130, 100], tables[::-1])
        stage.forward(_moved(first, device), None, kv)
        logits = stage.logits(stage.forward(_moved(second, device), None, kv))
        assert logits.dtype is torch.float32
        results.append(logits.cpu())
    scale = results[0].std()
    assert scale > 0
    assert (results[0] - results[1]).abs().max() < close * scale


def test_the_sampler_draws_the_same_tokens() -> None:
    vocab, every = 40_000, []
    for top_k in (0, 7):
        for top_p in (0.5, 1.0):
            every.append(SamplingParams(seed=9, top_k=top_k, top_p=top_p, min_p=0.01, logprobs=3))
            every.append(SamplingParams(temperature=0.0, frequency_penalty=1.0, min_tokens=3))
    logits = torch.randn(len(every), vocab, generator=torch.Generator().manual_seed(0)) * 3
    results = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(vocab, 16, device, eos_token_ids=(1,))
        for slot, params in enumerate(every):
            sampler.admit(slot, params, [3, 4, 5], 3)
        slots = list(range(len(every)))
        for place in range(3, 13):
            out = sampler.sample(
                logits.to(device),
                torch.tensor(slots, device=device),
                [place] * len(every),
                slots_host=slots,
            )
            results.append(out.token_ids.cpu())
    assert torch.equal(torch.stack(results[:10]), torch.stack(results[10:]))
