"""The whole engine on a GPU: greedy output equals transformers' token for token, in fp32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from serving import LLM, SamplingParams
from tests.serving.processes import eventually
from tests.serving.tiny import FAMILIES, greedy_answers, make_checkpoint

pytestmark = pytest.mark.gpu

OUT = 40


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")


def _prompts() -> list[list[int]]:
    source = random.Random(3)
    shared = [source.randrange(250) for _ in range(50)]
    lengths = (1, 15, 16, 17, 33, 90, 200)
    fresh = [[source.randrange(250) for _ in range(n)] for n in lengths]
    return [*fresh, shared, [*shared, 7], [*shared[:32], 9, 9]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("graphs", "chunk", "pages"), [(True, 512, None), (True, 24, 20), (False, 64, 20)]
)
def test_greedy_equals_transformers(
    family: str, graphs: bool, chunk: int, pages: int | None, tmp_path: Path
) -> None:
    """Recorded and plain steps; prompts in one piece and in chunks; with preemptions."""
    folder = make_checkpoint(tmp_path / family, family, eos_token_id=319)
    prompts = _prompts()
    params = SamplingParams(max_tokens=OUT, temperature=0.0, ignore_eos=True)
    with LLM(
        folder, device="cuda", dtype="float32", cuda_graphs=graphs, max_num_batched_tokens=chunk,
        num_kv_pages=pages, kv_memory=1 << 26, max_model_len=256, max_num_seqs=16,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params)
        again = llm.generate(prompts[:2], params)
        assert eventually(lambda: llm.engine.stats.pages_used == 0)
    answers = [output.outputs[0].token_ids for output in outputs]
    # The reference stops at its end token, which our sequences ignore.
    for answer, expected in zip(answers, greedy_answers(folder, prompts, OUT), strict=True):
        assert answer[: len(expected)] == expected
    assert [output.outputs[0].token_ids for output in again] == answers[:2]


def test_sampling_does_not_depend_on_neighbours(tmp_path: Path) -> None:
    """Plain rows are drawn by a kernel, rows with filters by torch; a seed means the same text."""
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    plain = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    filtered = SamplingParams(max_tokens=30, seed=6, top_k=20, top_p=0.9, ignore_eos=True)
    asked = SamplingParams(
        max_tokens=30, seed=7, logprobs=3, frequency_penalty=0.5, min_tokens=20, min_p=0.01
    )
    prompt = [1, 2, 3, 4, 5]
    every = [plain, filtered, asked]
    with LLM(folder, device="cuda", dtype="float32", max_num_seqs=16, kv_memory=1 << 26) as llm:
        alone = [llm.generate([prompt], params)[0].outputs[0] for params in every]
        together = [out.outputs[0] for out in llm.generate([prompt] * 3, every)]
    assert [out.token_ids for out in alone] == [out.token_ids for out in together]
    assert alone[2].logprobs is not None
    assert len(alone[2].logprobs) >= 20
    with LLM(folder, device="cpu", dtype="float32", max_num_seqs=16, kv_memory=1 << 26) as llm:
        host = [out.outputs[0].token_ids for out in llm.generate([prompt] * 3, every)]
    assert [out.token_ids for out in alone] == host
