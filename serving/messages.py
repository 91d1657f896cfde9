"""Typed messages between the processes of one engine, as msgpack over zmq.

    client process  --Submit, Abort, Stop-->  driver  --AllocateKv, StepPlan, Shutdown-->  stages
    client process  <--Ready, StepOutputs...  driver  <--StepResult, StageStats, ...----   stages

Arrays travel as little-endian bytes. Nothing is pickled.
"""

from __future__ import annotations

import msgspec

from serving.config.engine import EngineConfig
from serving.core import FinishReason, Layout, Request, StepPlan

# ---- client process to driver


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    stream: int


class Rebalance(msgspec.Struct, frozen=True, tag="rebalance"):
    """Move layers so that stage i has counts[i] of them."""

    counts: list[int]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the engine: the driver shuts the stages down and exits."""


ToDriver = Submit | Abort | Rebalance | Stop


# ---- driver to client process


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A line for people while the engine starts."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can produce tokens, for the first time or again."""

    num_pages: int
    max_model_len: int


class Recovering(msgspec.Struct, frozen=True, tag="recovering"):
    """The stages ended, for the reason given, and are started again. Nothing is lost: `requests`
    sequences that are not finished go on after the next Ready.
    """

    reason: str
    requests: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine ended by itself. `kind` says which exception a start raises."""

    reason: str
    kind: str = "dead"  # "config", "model" or "dead"
    flag: str | None = None


class Admitted(msgspec.Struct, frozen=True, array_like=True):
    """A stream left the queue; `cached_tokens` of its prompt came from the prefix cache."""

    stream: int
    cached_tokens: int


class Ended(msgspec.Struct, frozen=True, array_like=True):
    stream: int
    reason: FinishReason
    stop_token_id: int | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """The driver does not take the stream: its first token would come after `ttft` seconds, which
    is `retry_after` seconds more than is allowed.
    """

    stream: int
    ttft: float
    retry_after: float


class StepOutputs(msgspec.Struct, kw_only=True, frozen=True, tag="outputs"):
    """New tokens: tokens[i] (int32) belongs to streams[i] (int64).

    Tokens of streams that asked for logprobs come with them: `logprob_rows[j]` is the index i of
    row j of `logprobs` (float32), whose alternatives are `top_ids` and `top_logprobs`, [rows, k].
    """

    streams: bytes = b""
    tokens: bytes = b""
    admitted: list[Admitted] = []
    refused: list[Refused] = []
    ended: list[Ended] = []
    logprob_rows: bytes = b""
    logprobs: bytes = b""
    top_ids: bytes = b""
    top_logprobs: bytes = b""
    top_k: int = 0


class StageSeconds(msgspec.Struct, kw_only=True):
    """Where a stage's time went, in seconds since it started.

    `busy`: building inputs, running layers, sampling. `wait_input`: has a plan, waits for its
    activations or tokens, or for KV of layers that came to it. `wait_link`: waits until an earlier
    send has left the buffer it needs. `idle`: has no plan.
    """

    busy: float = 0.0
    wait_input: float = 0.0
    wait_link: float = 0.0
    idle: float = 0.0


class LayersMoved(msgspec.Struct, frozen=True, tag="layers_moved"):
    """From the first micro-batch of `epoch` on stage i has counts[i] layers. `seconds` from the
    decision to the switch; `slowest` is the stage for whose sake they moved, None when that was
    asked for."""

    epoch: int
    counts: list[int]
    before: list[int]
    seconds: float
    slowest: int | None
    why: str


class EngineStats(msgspec.Struct, kw_only=True, tag="stats"):
    """A picture of the engine; counters count since its start, those of `stages` since theirs.

    `restarts` counts how often the stages were started again after one had died.
    `microbatches` lists [decode tokens, prefill tokens] of each micro-batch since the last picture.
    `prediction_errors` is the mean relative error of late predictions of each stage's step time,
    `layers` the number of layers of each stage.
    """

    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_used: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = {}
    in_flight: int = 0
    microbatches: list[tuple[int, int]] = []
    stages: list[StageSeconds] = []
    prediction_errors: list[float | None] = []
    layers: list[int] = []
    restarts: int = 0


class StepTime(msgspec.Struct, frozen=True, array_like=True):
    """One stage's work on micro-batch `number`, in seconds; times are those of time.monotonic.

    `busy` is without what was spent waiting. From `began`, when the stage had all of its input, to
    `ended` it worked on nothing else; what it prepared while the input was on its way counts as
    busy and lies before `began`.
    """

    number: int
    busy: float
    began: float
    ended: float


class StepPlanned(msgspec.Struct, frozen=True, tag="planned"):
    """Micro-batch `number` of a layout's `epoch` was sent to the stages; what it holds.

    This and `StageSteps` are told with `EngineConfig.record_steps` alone.
    """

    number: int
    epoch: int
    decodes: int
    prompt_tokens: int


class StageSteps(msgspec.Struct, frozen=True, tag="times"):
    """When a stage worked on late micro-batches, in their order."""

    stage: int
    steps: list[StepTime]


ToClient = (
    Progress
    | Ready
    | Recovering
    | Failed
    | StepOutputs
    | LayersMoved
    | EngineStats
    | StepPlanned
    | StageSteps
)


# ---- driver to stage


class AllocateKv(msgspec.Struct, frozen=True, tag="kv", array_like=True):
    """Every stage has loaded: make `num_pages` KV pages a layer and warm up.

    `max_model_len` tokens is the longest sequence, which sizes the page table.
    """

    num_pages: int
    max_model_len: int


class MoveLayers(msgspec.Struct, frozen=True, tag="move", array_like=True):
    """Layers are going to change their stages, as `layout` says, with the first plan of its epoch.

    Until then the old owners send KV to the new ones: all `pages` (uint32) that hold anything now,
    then what each micro-batch planned after this message writes.
    """

    layout: Layout
    pages: bytes


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    pass


ToStage = AllocateKv | StepPlan | MoveLayers | Shutdown


# ---- stage to driver


class StageProgress(msgspec.Struct, frozen=True, tag="progress"):
    stage: int
    text: str


class StageLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Weights are in place; `max_pages` KV pages fit into this rank's memory budget.

    `device` is the name of what the stage runs on, `dtype` of the numbers it computes with: step
    times learnt in one run are used in another where both are equal.
    """

    stage: int
    max_pages: int
    rank: int = 0
    device: str = ""
    dtype: str = ""


class StageStarted(msgspec.Struct, frozen=True, tag="started"):
    stage: int
    rank: int = 0


class StageStats(msgspec.Struct, frozen=True, tag="stats"):
    """`steps` are the micro-batches that ended since the last message."""

    stage: int
    seconds: StageSeconds
    steps: list[StepTime] = []


class LayersCopied(msgspec.Struct, frozen=True, tag="copied"):
    """A rank that gets layers has all pages of the move to `epoch`; when `settled`, also what was
    written until the switch."""

    stage: int
    rank: int
    epoch: int
    settled: bool


class StageFailed(msgspec.Struct, frozen=True, tag="failed"):
    stage: int
    kind: str
    message: str
    flag: str | None = None
    rank: int = 0


class StepResult(msgspec.Struct, kw_only=True, frozen=True, tag="result"):
    """Micro-batch `number` is finished; `tokens` (int32) in the order of its sampled rows.

    Log probabilities cover all rows when any row asked for them: `logprobs` float32 [rows],
    `top_ids` int32 and `top_logprobs` float32 [rows, top_k].
    """

    number: int
    tokens: bytes = b""
    logprobs: bytes = b""
    top_ids: bytes = b""
    top_logprobs: bytes = b""
    top_k: int = 0


FromStage = (
    StageProgress
    | StageLoaded
    | StageStarted
    | StageStats
    | LayersCopied
    | StageFailed
    | StepResult
)


# ---- what a child process reads from its standard input at start


class DriverSpec(msgspec.Struct, kw_only=True, frozen=True):
    config: EngineConfig
    directory: str
    parent_pid: int
    layout: Layout
    vocab_size: int
    eos_token_ids: list[int]
    context_length: int


class StageSpec(msgspec.Struct, kw_only=True, frozen=True):
    """`layout` is the one to begin with, `home` the one from which layers may move so far."""

    config: EngineConfig
    directory: str
    parent_pid: int
    layout: Layout
    home: Layout
    stage: int
    threads: int
    rank: int = 0

    @property
    def worker(self) -> int:
        """This process's number in its group: stage by stage, in each rank by rank."""
        return self.stage * self.config.tensor_parallel_size + self.rank


def socket_address(directory: str, name: str) -> str:
    """Address of a group's ipc socket: `driver`, `client`, `results`, `plans-0`, `plans-1`..."""
    return f"ipc://{directory}/{name}"
