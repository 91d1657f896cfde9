"""Pipelines over GPUs: the same tokens as one GPU and as transformers; a death ends the group."""

from __future__ import annotations

import os
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from serving import LLM, SamplingParams
from serving.errors import ConfigError, EngineDeadError
from serving.messages import Recovering, StageSteps, StepPlanned, StepTime
from tests.serving.processes import children_of, eventually, gone
from tests.serving.tiny import FAMILIES, greedy_answers, make_checkpoint

pytestmark = pytest.mark.gpu

OUT = 40
GREEDY = SamplingParams(max_tokens=OUT, temperature=0.0, ignore_eos=True)


def _needs(gpus: int) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < gpus:
        pytest.skip(f"needs {gpus} NVIDIA GPUs, and there are {found} here")


def _stages(place: str, stages: int) -> dict[str, Any]:
    """Settings for stages on GPUs of their own, or all on the first."""
    if place == "shared":
        _needs(1)
        return {"pipeline_parallel_size": stages, "devices": ["cuda:0"] * stages}
    _needs(stages)
    return {"pipeline_parallel_size": stages}


def _engine(folder: Path, **settings: Any) -> LLM:
    common: dict[str, Any] = {
        "dtype": "float32", "kv_memory": 1 << 26, "max_model_len": 256, "max_num_seqs": 16,
    }  # fmt: skip
    return LLM(folder, **(common | settings))


def _prompts() -> list[list[int]]:
    source = random.Random(3)
    shared = [source.randrange(250) for _ in range(50)]
    lengths = (1, 15, 16, 17, 33, 90, 200)
    fresh = [[source.randrange(250) for _ in range(n)] for n in lengths]
    return [*fresh, shared, [*shared, 7], [*shared[:32], 9, 9]]


def _answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert eventually(lambda: llm.engine.stats.pages_used == 0)
    return [list(tokens) for tokens in found]


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize(
    ("stages", "graphs", "chunk", "pages"),
    [(2, True, 512, None), (2, True, 24, 20), (2, False, 64, 20), (4, True, 64, None)],
)
def test_greedy_equals_one_gpu_and_transformers(
    stages: int, graphs: bool, chunk: int, pages: int | None, place: str, tmp_path: Path
) -> None:
    """Recorded and plain steps; prompts in one piece and in chunks; with preemptions; other stage
    counts than the layers divide by."""
    where = _stages(place, stages)
    prompts = _prompts()
    families = FAMILIES if (stages, chunk) == (2, 512) else FAMILIES[:2]
    for family in families:
        folder = make_checkpoint(tmp_path / family, family, eos_token_id=319, num_hidden_layers=5)
        settings: dict[str, Any] = {
            "cuda_graphs": graphs, "max_num_batched_tokens": chunk, "num_kv_pages": pages,
        }  # fmt: skip
        with _engine(folder, **where, **settings) as llm:
            answers = _answers(llm, prompts)
            assert _answers(llm, prompts[:2]) == answers[:2]
        with _engine(folder, device="cuda", **settings) as llm:
            assert answers == _answers(llm, prompts)
        # The reference stops at its end token, which our sequences ignore.
        for answer, expected in zip(answers, greedy_answers(folder, prompts, OUT), strict=True):
            assert answer[: len(expected)] == expected


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_sampling_does_not_depend_on_the_stages(transport: str, place: str, tmp_path: Path) -> None:
    if (transport, place) == ("nccl", "shared"):
        pytest.skip("NCCL links GPUs, not processes on one")
    where = _stages(place, 2)
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    every = [
        SamplingParams(max_tokens=30, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=30, seed=6, top_k=20, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=30, seed=7, logprobs=3, frequency_penalty=0.5, min_tokens=20),
        SamplingParams(max_tokens=1, seed=8, ignore_eos=True),
    ] * 3
    prompts = [[1, 2, 3, 4, 5]] * len(every)

    def texts(**settings: Any) -> list[list[int]]:
        with _engine(folder, **settings) as llm:
            return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, every)]

    assert texts(**where, transport=transport) == texts(device="cuda")


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize("graphs", [True, False])
def test_stages_say_when_they_worked(graphs: bool, place: str, tmp_path: Path) -> None:
    """Each after the one before it, by one clock; and what they say is learnt from."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    planned: list[StepPlanned] = []
    steps: tuple[dict[int, StepTime], dict[int, StepTime]] = {}, {}

    def take(message: StepPlanned | StageSteps) -> None:
        if isinstance(message, StepPlanned):
            planned.append(message)
        else:
            steps[message.stage].update((step.number, step) for step in message.steps)

    with _engine(folder, **_stages(place, 2), cuda_graphs=graphs, record_steps=True) as llm:
        llm.engine.on_steps = take
        began = time.monotonic()
        params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
        llm.generate([[1, 2, 3]] * 8, params)
        ended = time.monotonic()
        numbers = [one.number for one in planned]
        assert len(numbers) > 100
        assert eventually(lambda: all(numbers[-1] in stage for stage in steps))
        # What was learnt is told with the next picture of the engine.
        llm.generate([[5]], GREEDY)
        assert eventually(lambda: None not in llm.engine.stats.prediction_errors)
    first, second = ([stage[number] for number in numbers] for stage in steps)
    for own in (first, second):
        assert all(step.busy > 0 for step in own)
        assert all(began < step.began <= step.ended < ended + 0.1 for step in own)
    # A device's clock is told by when a busy host sees its steps end, so not all are exact.
    pairs = [*pairwise(first), *pairwise(second), *zip(first, second, strict=True)]
    early = sorted(before.ended - after.began for before, after in pairs)
    assert early[len(early) * 9 // 10] < 0.002


@pytest.mark.parametrize("place", ["own", "shared"])
def test_many_sequences_of_one_token_and_a_long_one(place: str, tmp_path: Path) -> None:
    """Most drawn tokens are never read by the first stage, beside decodes that are."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    source = random.Random(1)
    prompts = [[source.randrange(250) for _ in range(source.randint(1, 30))] for _ in range(200)]
    params = [
        SamplingParams(max_tokens=200 if n == 0 else 1, temperature=0.0, ignore_eos=True)
        for n in range(200)
    ]
    with _engine(folder, **_stages(place, 2), max_num_batched_tokens=32) as llm:
        found = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]
        assert eventually(lambda: llm.engine.stats.pages_used == 0)
        assert eventually(lambda: all(stage.busy > 0 for stage in llm.engine.stats.stages))
        assert llm.engine.stats.stages[1].wait_input > 0
    with _engine(folder, device="cuda", max_num_batched_tokens=32) as llm:
        assert found == [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


@pytest.mark.parametrize("place", ["own", "shared"])
@pytest.mark.parametrize("victim", [0, 1])
def test_answers_go_on_over_a_killed_stage(victim: int, place: str, tmp_path: Path) -> None:
    """Its neighbours' streams wait for words that nobody writes any more."""
    folder = make_checkpoint(tmp_path / "model", "llama", max_position_embeddings=1 << 15)
    long = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)
    prompts = [[1, 2, 3, number] for number in range(4)]
    with _engine(folder, **_stages(place, 2), max_model_len=1 << 15) as llm:
        undisturbed = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, long)]
        stages = children_of(os.getpid(), "serving.stage")
        assert len(stages) == 2
        found: list[list[int]] = []
        recoveries: list[Recovering | None] = []
        llm.engine.on_recovery = recoveries.append

        def generate() -> None:
            found.extend(list(one.outputs[0].token_ids) for one in llm.generate(prompts, long))

        assert eventually(lambda: llm.engine.stats.pages_used == 0)
        before = llm.engine.stats.generation_tokens
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        assert eventually(lambda: llm.engine.stats.generation_tokens > before + 50)
        sorted(stages, key=lambda process: process.pid)[victim].kill()
        thread.join(120)
        assert found == undisturbed
        assert recoveries[0] is not None
        assert f"Stage {victim} was killed by signal 9" in recoveries[0].reason
        assert recoveries[1:] == [None]
        assert gone(stages)


@pytest.mark.parametrize("place", ["own", "shared"])
def test_closing_in_mid_run_is_quick(place: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", max_position_embeddings=1 << 15)
    endless = SamplingParams(max_tokens=30_000, temperature=0.0, ignore_eos=True)
    llm = _engine(folder, **_stages(place, 2), max_model_len=1 << 15)
    stages = children_of(os.getpid(), "serving.stage")

    def generate() -> None:
        try:
            llm.generate([[1, 2, 3]] * 4, endless)
        except EngineDeadError:
            return

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    assert eventually(lambda: llm.engine.stats.generation_tokens > 50)
    started = time.monotonic()
    llm.close()
    assert time.monotonic() - started < 20
    assert eventually(lambda: gone(stages), 20)


def test_too_many_stages_are_refused(tmp_path: Path) -> None:
    _needs(1)
    stages = torch.cuda.device_count() + 1
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=stages)
    with pytest.raises(ConfigError, match="lower --pipeline-parallel-size"):
        _engine(folder, pipeline_parallel_size=stages)
