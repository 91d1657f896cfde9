"""Greedy output in bfloat16 may leave the reference's only where two tokens are nearly alike."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from serving import LLM, SamplingParams
from tests.serving.tiny import FAMILIES, load_reference, make_soft_checkpoint

pytestmark = pytest.mark.gpu

OUT = 48
NEAR = 0.05  # between the two best logits of the reference


def _needs(gpus: int) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < gpus:
        pytest.skip(f"needs {gpus} NVIDIA GPUs, and there are {found} here")


def _prompts() -> list[list[int]]:
    source = random.Random(11)
    return [[source.randrange(250) for _ in range(n)] for n in (3, 16, 40, 77, 130, 200, 300, 420)]


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_differences_are_near_ties(
    family: str, stages: int, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _needs(stages * ranks)
    folder = make_soft_checkpoint(tmp_path / family, family)
    prompts = _prompts()
    with LLM(
        folder, device="cuda", dtype="bfloat16", pipeline_parallel_size=stages,
        tensor_parallel_size=ranks, kv_memory=1 << 26, max_model_len=512, max_num_seqs=16,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=OUT, temperature=0.0, ignore_eos=True)
        answers = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]
    reference = load_reference(folder, torch.bfloat16).cuda()
    left: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer], device="cuda")
            logits = reference(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(answer, device="cuda")
        # All tokens before the first difference are the reference's own, so its logits there are
        # those of its own greedy road.
        other = (logits.argmax(-1) != chosen).nonzero().flatten()
        if not len(other):
            continue
        at = int(other[0])
        best = logits[at].topk(2).values
        gap = float(best[0] - best[1])
        left.append(gap)
        assert gap <= NEAR, f"token {at} of {len(answer)}: the two best logits are {gap:.3f} apart"
        # And the token taken is the reference's second choice, or as good as it.
        assert float(best[0] - logits[at, answer[at]]) <= NEAR
    with capsys.disabled():
        print(
            f"\n{family}, {stages} stages x {ranks} ranks: {len(left)} of {len(prompts)} answers "
            f"of {OUT} tokens leave the reference's, where its best logits are "
            f"{max(left, default=0.0):.4f} apart or less"
        )
