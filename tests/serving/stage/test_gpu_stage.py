"""A GPU stage's own code without a GPU: its kernels in Triton's interpreter, streams that run at
once. Greedy output of pipelines equals transformers'."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from serving.config.engine import EngineConfig
from serving.config.model import ModelConfig
from serving.core import Layout, SamplingParams, StepPlan
from serving.messages import StepResult
from serving.stage.mirror import Mirror
from tests.serving.driver.fake import FakeEngine
from tests.serving.interpreter import why_not_interpreted
from tests.serving.tiny import load_reference, make_checkpoint
from tests.serving.transport.simulated_gpu import ImmediateGpu, Notes, World

PAGES, CONTEXT = 24, 64


class _Event:
    """Time goes on by a millisecond with every event."""

    clock = itertools.count()

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self, stream: object = None) -> None:
        self.at = next(self.clock)

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Event) -> float:
        return float(other.at - self.at)


class Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := why_not_interpreted():
        pytest.skip(why)
    from serving.attention.triton_paged import TritonAttention

    cpu = torch.device("cpu")
    monkeypatch.setenv("LECTERN_NATIVE", "0")
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2)
    )
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 10 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr("serving.models.choose_attention", lambda *_: TritonAttention(cpu))
    monkeypatch.setattr("serving.stage.gpu.stage.to_host", lambda tensor: tensor.clone())
    monkeypatch.setattr(
        "serving.stage.gpu.stage.device_tensor",
        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype),
    )


class Pipeline:
    """Every stage of a model in this process; takes the place of the fake engine's model."""

    def __init__(self, folder: Path, config: EngineConfig, movable: int = 0) -> None:
        from serving.models import build_stage
        from serving.stage.gpu.stage import GpuStage
        from serving.transport.peer import PeerTransport

        model = ModelConfig.from_folder(folder)
        stages = config.pipeline_parallel_size
        layout = Layout.even(model.num_layers, stages)
        world, notes = World(0), Notes()
        self.results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.failures: list[str] = []
        self.stages: list[GpuStage] = []
        self.links: list[PeerTransport] = []
        for stage in range(stages):
            if stages > 1:
                gpu = ImmediateGpu(world)
                self.links.append(
                    PeerTransport(
                        stage, stages, gpu, gpu.stream(), notes,
                        max_tokens=config.max_num_batched_tokens, hidden_size=model.hidden_size,
                        dtype=torch.float32, max_rows=config.max_num_seqs,
                    )
                )  # fmt: skip
            stream: Any = Stream()
            self.stages.append(
                GpuStage(
                    build_stage(
                        model, layout.resident(stage, movable),
                        first=stage == 0, last=stage == stages - 1,
                        dtype=torch.float32, device="cpu",
                    ),
                    config, model, stream=stream, stage=stage,
                    transport=self.links[stage] if stages > 1 else None, sharing=1,
                    send=self.results.put, failed=self.failures.append,
                    pieces=layout.pieces(stage, movable),
                )
            )  # fmt: skip
        for links in self.links:
            links.connect()
        # The numbers below 0, which the links' own check would use.
        for number in range(-stages - 1, 0):
            for stage, links in enumerate(self.links):
                if stage > 0:
                    links.incoming(number, 1)
                    links.taken(number)
                if stage < stages - 1:
                    links.outgoing(number, 1)
                    links.send(number, 1)
        for stage, one in enumerate(self.stages):
            one.compute(layout.layers(stage))
        self.plans = [stage.plan_memory() for stage in self.stages]
        for stage in self.stages:
            stage.allocate(PAGES, CONTEXT)
        self.mirrors = [
            Mirror(config.max_num_seqs, CONTEXT, config.page_size, holds_tokens=stage == 0)
            for stage in range(stages)
        ]

    def run(self, plan: StepPlan) -> StepResult:
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        sampler = self.stages[-1].sampler
        assert sampler is not None
        for slot in np.frombuffer(plan.released, dtype="<u2").tolist():
            sampler.release(slot)
        for new in plan.admitted:
            tokens = np.frombuffer(new.tokens, dtype="<i4").tolist()
            assert new.params is not None
            sampler.admit(new.slot, new.params, tokens, new.prompt_len, new.choice)
        for stage in range(len(self.stages)):
            self.step(stage, plan)
        assert not self.failures
        return self.results.get(timeout=20)

    def step(self, stage: int, plan: StepPlan) -> None:
        self.stages[stage].step(self.mirrors[stage].apply(plan), plan)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def make_small(folder: Path, layers: int) -> Path:
    return make_checkpoint(
        folder, "llama", num_hidden_layers=layers, hidden_size=32,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("tiny") / "model", 3)


PROMPTS = [[1, 2, 3], [9], [4] * 11, [7, 8, 6, 5, 2]]
OUT = 5


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return reference(checkpoint)


def reference(checkpoint: Path) -> list[list[int]]:
    """What transformers answers to the prompts."""
    model = load_reference(checkpoint)
    return [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=OUT, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


def _run(
    checkpoint: Path, stages: int, params: list[dict[str, Any]], *, recorded: bool = False
) -> list[list[int]]:
    engine = FakeEngine(
        PAGES, CONTEXT, pipeline_parallel_size=stages, max_num_batched_tokens=8, max_num_seqs=4,
        cuda_graphs=recorded, page_size=4, enable_prefix_caching=False,
    )  # fmt: skip
    pipeline: Any = Pipeline(checkpoint, engine.config)
    engine.model = pipeline
    streams = [
        engine.submit(prompt, **settings) for prompt, settings in zip(PROMPTS, params, strict=True)
    ]
    # As many plans in flight as the driver allows; every stage runs them in order.
    while engine.scheduler.streams or engine.plans:
        while engine.plan() is not None:
            pass
        engine.run_one()
    assert all((stage._replayed > 0) == recorded for stage in pipeline.stages)
    seconds = [stage.seconds() for stage in pipeline.stages]
    assert all(second.busy > 0 for second in seconds)
    assert all((second.wait_input > 0) == (stages > 1) for second in seconds)
    assert [second.wait_link > 0 for second in seconds] == [True] * (stages - 1) + [False]
    pipeline.close()
    seconds = [stage.seconds() for stage in pipeline.stages]
    for stage, second in zip(pipeline.stages, seconds, strict=True):
        steps = stage.take_steps()
        assert [step.number for step in steps] == list(range(len(steps)))
        assert sum(step.busy for step in steps) == pytest.approx(second.busy)
        # What a stage does before its input is there is busy and not in the span.
        assert all(0 < step.ended - step.began <= step.busy + 1e-9 for step in steps)
    return [engine.outputs[stream] for stream in streams]


def record_nothing(graphs: Any, kind: str, size: Any, work: Callable[[], None]) -> None:
    """In place of a recording: the same work once more at every replay."""
    work()
    graphs._graphs[kind, size] = SimpleNamespace(replay=work)


@pytest.mark.parametrize(("stages", "recorded"), [(1, False), (3, False), (2, True)])
def test_greedy_output(
    stages: int,
    recorded: bool,
    checkpoint: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At their own sizes, and at padded ones as recorded steps run."""
    monkeypatch.setattr("serving.stage.gpu.graphs.StepGraphs.record", record_nothing)
    params = [{"max_tokens": OUT, "temperature": 0.0, "ignore_eos": True}] * len(PROMPTS)
    found = _run(checkpoint, stages, params, recorded=recorded)
    for answer, right in zip(found, expected, strict=True):
        assert answer[: len(right)] == right


def test_sampled_output_does_not_depend_on_the_stages(checkpoint: Path) -> None:
    """Filters and penalties take another way than plain rows; some never decode at all."""
    params: list[dict[str, Any]] = [
        {"max_tokens": 4, "seed": 3, "ignore_eos": True},
        {"max_tokens": 1, "seed": 4},
        {"max_tokens": 4, "seed": 5, "top_k": 20, "top_p": 0.9, "ignore_eos": True},
        {"max_tokens": 4, "seed": 6, "presence_penalty": 0.5, "ignore_eos": True},
    ]
    assert SamplingParams(**params[2]).top_k == 20
    assert _run(checkpoint, 1, params) == _run(checkpoint, 2, params)


def test_only_the_last_stage_needs_room_for_logits(checkpoint: Path) -> None:
    config = EngineConfig(
        model=checkpoint, pipeline_parallel_size=2, max_num_batched_tokens=8, max_num_seqs=4,
        cuda_graphs=False,
    )  # fmt: skip
    pipeline = Pipeline(checkpoint, config)
    assert pipeline.stages[0].sampler is None
    assert pipeline.stages[1].sampler is not None
    assert [(plan.taken, plan.step) for plan in pipeline.plans] == [(2 << 30, 2 << 20)] * 2
    pipeline.close()
