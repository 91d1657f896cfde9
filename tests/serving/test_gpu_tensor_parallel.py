"""Stages of several ranks on GPUs: greedy output equals transformers' and that of one rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from serving import LLM, SamplingParams
from serving.messages import Recovering
from tests.serving.processes import children_of, eventually, gone
from tests.serving.tiny import greedy_answers, make_checkpoint

pytestmark = pytest.mark.gpu

OUT = 40

#: Biases and a vocabulary that does not divide; one key-value head on all ranks, tied; head norms.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "vocab_size": 323},
    "qwen2": {"num_attention_heads": 4},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "mistral": {"num_attention_heads": 8, "num_key_value_heads": 2},
}


def _needs(gpus: int) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < gpus:
        pytest.skip(f"needs {gpus} NVIDIA GPUs in one host, and there are {found}")


def _prompts() -> list[list[int]]:
    source = random.Random(3)
    shared = [source.randrange(250) for _ in range(50)]
    fresh = [[source.randrange(250) for _ in range(n)] for n in (1, 15, 16, 17, 33, 90, 200)]
    return [*fresh, shared, [*shared, 7], [*shared[:32], 9, 9]]


def _check(
    family: str,
    folder: Path,
    ranks: int,
    stages: int = 1,
    *,
    also_alone: bool = False,
    **settings: Any,
) -> None:
    """Greedy against transformers (and against the engine of one rank); drawn texts against
    themselves with other neighbours."""
    make_checkpoint(folder, family, eos_token_id=319, **SIZES[family])
    prompts = _prompts()
    greedy = SamplingParams(max_tokens=OUT, temperature=0.0, ignore_eos=True)
    plain = [SamplingParams(max_tokens=12, seed=seed, ignore_eos=True) for seed in range(4)]
    filtered = [
        SamplingParams(max_tokens=12, seed=seed, top_p=0.9, top_k=40, logprobs=2, ignore_eos=True)
        for seed in range(4)
    ]
    usual: dict[str, Any] = {
        "device": "cuda", "dtype": "float32", "kv_memory": 1 << 26, "max_model_len": 256,
        "max_num_seqs": 16,
    }  # fmt: skip
    with LLM(
        folder,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=stages,
        **(usual | settings),
    ) as llm:
        assert len(children_of(psutil.Process().pid, "serving.stage")) == ranks * stages
        answers = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        for drawn in (plain, filtered):
            together = llm.generate(prompts[:4], drawn)
            alone = [llm.generate(p, s)[0] for p, s in zip(prompts, drawn, strict=False)]
            assert [out.outputs[0].token_ids for out in together] == [
                out.outputs[0].token_ids for out in alone
            ]
        assert eventually(lambda: llm.engine.stats.pages_used == 0)
    # The reference stops at its end token, which our sequences ignore.
    for answer, expected in zip(answers, greedy_answers(folder, prompts, OUT), strict=True):
        assert answer[: len(expected)] == expected
    if also_alone:
        with LLM(folder, **(usual | settings)) as llm:
            assert answers == [
                output.outputs[0].token_ids for output in llm.generate(prompts, greedy)
            ]


@pytest.mark.parametrize("family", SIZES)
def test_two_ranks(family: str, tmp_path: Path) -> None:
    _needs(2)
    _check(family, tmp_path / family, 2, also_alone=True)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_ranks_without_recorded_steps(family: str, tmp_path: Path) -> None:
    _needs(2)
    _check(family, tmp_path / family, 2, cuda_graphs=False)


def test_two_ranks_with_chunks_and_preemptions(tmp_path: Path) -> None:
    _needs(2)
    _check("llama", tmp_path / "llama", 2, max_num_batched_tokens=24, num_kv_pages=20)


@pytest.mark.parametrize("graphs", [True, False])
def test_four_ranks(graphs: bool, tmp_path: Path) -> None:
    """Of two key-value heads, so two ranks hold each."""
    _needs(4)
    _check("mistral", tmp_path / "mistral", 4, cuda_graphs=graphs)


@pytest.mark.parametrize("graphs", [True, False])
def test_two_stages_of_two_ranks(graphs: bool, tmp_path: Path) -> None:
    _needs(4)
    _check("qwen2", tmp_path / "qwen2", 2, 2, cuda_graphs=graphs)


def test_two_stages_of_two_ranks_on_two_gpus(tmp_path: Path) -> None:
    """Stages may share a GPU; the ranks of one stage may not."""
    _needs(2)
    shared = ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    _check("qwen3", tmp_path / "qwen3", 2, 2, devices=shared, gpu_memory_utilization=0.4)


def test_a_rank_that_is_killed_is_named_and_replaced(tmp_path: Path) -> None:
    _needs(2)
    folder = make_checkpoint(tmp_path / "model", "llama")
    with LLM(
        folder, device="cuda", dtype="float32", tensor_parallel_size=2, kv_memory=1 << 26
    ) as llm:
        workers = children_of(psutil.Process().pid, "serving.stage")
        greedy = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        before = llm.generate([1, 2, 3], greedy)[0].outputs[0].token_ids
        recoveries: list[Recovering | None] = []
        llm.engine.on_recovery = recoveries.append
        max(workers, key=lambda process: process.pid).kill()
        assert llm.generate([1, 2, 3], greedy)[0].outputs[0].token_ids == before
        assert recoveries[0] is not None
        assert "Rank 1 of stage 0 was killed by signal 9" in recoveries[0].reason
        assert gone(workers)
