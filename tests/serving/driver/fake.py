"""A stage group without torch: the real scheduler and mirror around a model that is a hash.

Its KV cache is honest: a token's "KV" is the token and its position, written to the slot that the
plan names, and the next token is a hash of what is read back through the page table. A wrong page,
a page shared by mistake or freed too early therefore changes the output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np

from serving.config.engine import EngineConfig
from serving.config.service import Service
from serving.core import Request, SamplingParams, StepPlan
from serving.driver.completion import Completion
from serving.driver.outlook import StepSeconds
from serving.driver.scheduler import Scheduler
from serving.messages import StepResult
from serving.stage.mirror import Mirror, Rows

VOCAB = 50
EOS = 7


def next_token(tokens: Iterable[int]) -> int:
    return crc32(np.asarray(list(tokens), dtype="<i4").tobytes()) % VOCAB


def expected_output(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """What a sequence must produce, computed without any engine. The stop token is not shown."""
    tokens = list(prompt)
    output: list[int] = []
    assert params.max_tokens is not None
    while len(output) < params.max_tokens:
        token = next_token(tokens)
        tokens.append(token)
        enough = len(output) + 1 > params.min_tokens
        if enough and ((token == EOS and not params.ignore_eos) or token in params.stop_token_ids):
            return output, "stop"
        output.append(token)
    return output, "length"


class FakeModel:
    """Executes plans, one at a time, in order."""

    def __init__(self, config: EngineConfig, num_pages: int, max_model_len: int) -> None:
        self.page_size = config.page_size
        self.mirror = Mirror(
            config.max_num_seqs, max_model_len, config.page_size, holds_tokens=True
        )
        self.kv = np.full((num_pages * config.page_size, 2), -1, dtype=np.int64)
        self.last_token = np.zeros(config.max_num_seqs, dtype=np.int64)
        self.last_rows: Rows | None = None

    def run(self, plan: StepPlan) -> StepResult:
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        rows = self.mirror.apply(plan)
        self.last_rows = rows
        decodes = rows.slots[: rows.num_decodes]
        tokens = np.concatenate((self.last_token[decodes], rows.prompt_tokens))
        assert len(set(rows.slot_mapping.tolist())) == len(rows.slot_mapping)
        self.kv[rows.slot_mapping, 0] = tokens
        self.kv[rows.slot_mapping, 1] = rows.positions
        sampled = []
        ends = (rows.query_starts[1:] - 1).tolist()
        for index in rows.sampled_tokens.tolist():
            row = ends.index(index)
            length = int(rows.context_lens[row])
            places = np.arange(length)
            table = rows.page_tables[row].astype(np.int64)
            size = self.page_size
            read = self.kv[table[places // size] * size + places % size]
            assert (read[:, 1] == places).all(), "a page holds another position than it should"
            sampled.append(next_token(read[:, 0]))
        self.last_token[rows.sampled_slots] = sampled
        return StepResult(number=rows.number, tokens=np.array(sampled, dtype="<i4").tobytes())


class FakeEngine:
    """Scheduler, completion and fake stages in one process; the test says when what happens."""

    def __init__(
        self,
        num_pages: int = 64,
        max_model_len: int = 128,
        step_seconds: StepSeconds = lambda _: None,
        **settings: object,
    ) -> None:
        defaults: dict[str, object] = {"page_size": 4, "max_num_seqs": 8}
        self._settings = settings
        self.config = EngineConfig(model=Path("fake"), **(defaults | settings))  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config, num_pages, max_model_len, step_seconds)
        self.completion = Completion(self.scheduler, [EOS])
        self.model = FakeModel(self.config, num_pages, max_model_len)
        self.plans: deque[StepPlan] = deque()
        self.named: deque[set[int]] = deque()  # pages that each plan in flight names
        self.plan_sizes: list[int] = []
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.stop_tokens: dict[int, int | None] = {}
        self.params: dict[int, tuple[list[int], SamplingParams]] = {}

    def submit(
        self,
        prompt: list[int],
        salt: str = "",
        service: Service | None = None,
        now: float = 0.0,
        **params: object,
    ) -> int:
        stream = len(self.params) + 1
        sampling = SamplingParams(**({"max_tokens": 8} | params))  # type: ignore[arg-type]
        assert sampling.max_tokens is not None
        self.params[stream] = (prompt, sampling)
        self.outputs[stream] = []
        self.scheduler.submit(
            Request(
                stream=stream,
                prompt=np.array(prompt, dtype="<i4").tobytes(),
                params=sampling,
                max_tokens=sampling.max_tokens,
                cache_salt=salt,
                service=service or Service(),
            ),
            now=now,
        )
        return stream

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """Let the scheduler choose once; the plan is queued for the stages."""
        choice = self.scheduler.choose(now)
        if choice is None:
            return None
        batch, plan = choice
        self.plans.append(plan)
        self.plan_sizes.append(len(msgspec.msgpack.encode(plan)))
        slots = self.scheduler.slots
        self.named.append(
            {
                page
                for slot in (*batch.decode_slots.tolist(), *batch.prefill_slots.tolist())
                for page in slots[slot].pages
            }
        )
        return plan

    def run_one(self) -> None:
        """The stages finish the oldest plan in flight."""
        result = self.model.run(self.plans.popleft())
        self.named.popleft()
        _, outputs = self.completion.finish(result)
        streams = np.frombuffer(outputs.streams, dtype="<i8").tolist()
        tokens = np.frombuffer(outputs.tokens, dtype="<i4").tolist()
        for stream, token in zip(streams, tokens, strict=True):
            assert stream not in self.reasons, "a token after the end"
            self.outputs[stream].append(token)
        for ended in outputs.ended:
            self.reasons[ended.stream] = ended.reason
            self.stop_tokens[ended.stream] = ended.stop_token_id

    def lose_stages(self) -> None:
        """The stages die with all that is in flight; others have done a short request already."""
        limits = self.scheduler.pool.num_pages, self.scheduler.slots.tokens.shape[1]
        other = FakeEngine(*limits, **self._settings)  # type: ignore[arg-type]
        other.submit([0, 0, 0, 0], max_tokens=3, ignore_eos=True)
        other.run_all()
        self.plans.clear()
        self.named.clear()
        self.model = other.model
        self.scheduler.begin(other.scheduler)

    def check(self) -> None:
        """Invariants that hold between any two events."""
        self.scheduler.pool.check()
        for pages in self.named:
            free = set(self.scheduler.pool._free) | set(self.scheduler.pool._cached)
            assert not pages & free, "a page named by a plan in flight was given back"
        slots = self.scheduler.slots
        assert (slots.confirmed <= slots.planned).all()
        alive = slots.alive
        assert (slots.planned[alive] <= slots.known[alive] + 1).all()

    def run_all(self, limit: int = 10_000) -> None:
        """Plan as far ahead as allowed, always; ends when nothing is left."""
        for _ in range(limit):
            while self.plan() is not None:
                pass
            if not self.plans:
                assert not self.scheduler.streams, "work is queued and nothing runs"
                return
            self.run_one()
            self.check()
        raise AssertionError("requests did not finish")

    def check_outputs(self) -> None:
        """Every sequence that was not aborted gave exactly what it should."""
        for stream, (prompt, params) in self.params.items():
            if self.reasons.get(stream) in ("stop", "length"):
                output, reason = expected_output(prompt, params)
                assert self.outputs[stream] == output
                assert self.reasons[stream] == reason
