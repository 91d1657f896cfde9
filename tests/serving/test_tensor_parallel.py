"""Engines whose stages are several ranks: greedy output equals transformers' token for token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from serving import LLM, SamplingParams
from serving.config.engine import EngineConfig
from serving.engine import Engine
from serving.errors import ConfigError
from serving.messages import Recovering
from tests.serving.processes import children_of, eventually, gone
from tests.serving.tiny import greedy_answers, make_checkpoint

OUT = 16


class Case(NamedTuple):
    family: str
    ranks: int
    stages: int
    sizes: dict[str, Any]
    settings: dict[str, Any]


CASES = {
    "llama-biases-odd-vocabulary": Case(
        "llama", 2, 1, {"attention_bias": True, "mlp_bias": True, "vocab_size": 323},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    ),
    "qwen2-tied-two-stages": Case(
        "qwen2", 2, 2, {"num_attention_heads": 4}, {"max_num_batched_tokens": 32},
    ),
    "qwen3-starved": Case(
        "qwen3", 2, 1, {"num_attention_heads": 4, "num_key_value_heads": 2},
        {
            "num_kv_pages": 24, "page_size": 4, "max_num_batched_tokens": 24,
            "schedule_policy": "classic",
        },
    ),
    "mistral-three-ranks": Case(
        "mistral", 3, 1, {"num_key_value_heads": 3, "intermediate_size": 96}, {"page_size": 8},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _prompts() -> list[list[int]]:
    source = random.Random(11)
    shared = [source.randrange(256) for _ in range(40)]
    alone = [[source.randrange(256) for _ in range(length)] for length in (1, 14, 15, 16, 17, 70)]
    return [*alone, [*shared, 5], [*shared[:33], 9, 9]]


@pytest.mark.parametrize("name", CASES)
def test_greedy_output_equals_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = make_checkpoint(tmp_path / "model", case.family, **case.sizes)
    prompts = _prompts()
    expected = greedy_answers(folder, prompts, OUT)
    starved = "num_kv_pages" in case.settings
    usual = {"num_kv_pages": 64, "max_num_seqs": 8, "max_model_len": 96, "threads": 1}
    with LLM(
        folder,
        tensor_parallel_size=case.ranks,
        pipeline_parallel_size=case.stages,
        dtype="float32",
        device="cpu",
        **(usual | case.settings),  # type: ignore[arg-type]
    ) as llm:
        workers = children_of(psutil.Process().pid, "serving.stage")
        assert len(workers) == case.ranks * case.stages
        greedy = SamplingParams(max_tokens=OUT, temperature=0.0)
        for turn in range(2):  # the second time the prefix cache is warm
            results = llm.generate(prompts, greedy)
            assert [result.outputs[0].token_ids for result in results] == expected
            cached = sum(result.num_cached_tokens for result in results)
            if not case.settings.get("enable_prefix_caching", True):
                assert cached == 0
            elif turn and not starved:
                assert cached > 0
        # Drawn tokens are the same on every rank, or the next ones would be nonsense.
        drawn = [
            SamplingParams(max_tokens=8, seed=seed, top_p=0.95, ignore_eos=True)
            for seed in range(4)
        ]
        together = [result.outputs[0] for result in llm.generate(prompts[:4], drawn)]
        alone = [llm.generate(*each)[0].outputs[0] for each in zip(prompts, drawn, strict=False)]
        assert [out.token_ids for out in together] == [out.token_ids for out in alone]
        assert eventually(lambda: llm.engine.stats.pages_used == 0)
        assert (llm.engine.stats.preemptions > 0) == starved
        assert len(llm.engine.stats.stages) == case.stages
    assert eventually(lambda: gone(workers))


async def test_a_rank_that_is_killed_is_named_and_replaced_with_its_stage(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    engine = await Engine.start(
        EngineConfig(
            model=folder,
            tensor_parallel_size=2,
            dtype="float32",
            device="cpu",
            num_kv_pages=32,
            max_num_seqs=4,
            threads=1,
        )
    )
    recoveries: list[Recovering | None] = []
    engine.on_recovery = recoveries.append
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)

    async def answer(victim: psutil.Process | None) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate([1, 2, 3], params):
            tokens += output.token_ids
            if victim is not None and tokens:
                victim.kill()
                victim = None
        return tokens

    try:
        undisturbed = await answer(None)
        workers = children_of(psutil.Process().pid, "serving.stage")
        assert len(workers) == 2
        victim = max(workers, key=lambda process: process.pid)  # started last
        assert await answer(victim) == undisturbed
        assert recoveries == [
            Recovering("Rank 1 of stage 0 was killed by signal 9 (SIGKILL).", 1),
            None,
        ]
        assert gone(workers)
        assert len(children_of(psutil.Process().pid, "serving.stage")) == 2
    finally:
        await engine.close()


async def test_an_impossible_number_of_ranks_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match="to 1 or 2 ranks only") as error:
        await Engine.start(EngineConfig(model=folder, tensor_parallel_size=3))
    assert error.value.flag == "--tensor-parallel-size"
    assert not children_of(psutil.Process().pid, "serving.driver")
