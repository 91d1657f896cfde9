"""One validated configuration for the engine. An error names the flag and says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from serving.errors import ConfigError

GIB = 1 << 30
ORDERS = ("fcfs", "priority", "lpm", "sjf", "slo")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)


class EngineConfig(msgspec.Struct, kw_only=True, frozen=True):
    """Settings of one engine.

    `device` auto takes a GPU if there is one. `num_kv_pages` fixes the number of KV pages; else
    `kv_memory` bytes (all stages together) decide; without them it is 1 GiB on the CPU, and on a
    GPU what `gpu_memory_utilization` of its memory leaves. `cuda_graphs` records steps on a GPU.
    `attention` names the kernels of long prompts on a GPU: auto measures those that are installed.
    A stage is `tensor_parallel_size` processes, its ranks, which share out every layer.
    `schedule_policy` auto is throttle for more than one stage and classic for one; `prefill_spread`
    and `prefill_floor` belong to throttle (`serving/driver/throttle.py`). A micro-batch has at most
    `max_num_batched_rows` decodes and prompts together; None: `max_num_seqs`.
    `order` is the order of service of waiting prompts; the four that follow belong to slo
    (`serving/driver/order/slo.py`). Requests whose first token is predicted to come after more than
    `max_predicted_ttft` seconds are refused.
    `layer_layout` gives the number of layers of each stage. With `layer_rebalance` auto layers move
    between stages when that makes the slowest one faster, with asked when `Engine.move_layers` is
    called; each bound between two stages by at most `movable_layers`, for which both keep room.
    `devices` names one torch device a rank, those of stage 0 first. `threads` is the number of
    compute threads a rank; by default the cores are shared out. `step_timeout` seconds without a
    result of a running micro-batch mean that a stage hangs. `transport` links stages on GPUs: auto
    is peer where the machine allows it, else nccl. Where anything depends on predicted step times
    and none are kept from an earlier run, they are measured at start for about `profile_seconds`
    (0: they are learnt from the work alone). `record_steps` tells the client of every
    micro-batch when each stage worked on it.
    """

    model: Path
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    page_size: int = 16
    num_kv_pages: int | None = None
    kv_memory: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    attention: Literal["auto", "triton", "flashinfer"] = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    cache_eviction: Literal["lru", "fifo"] = "lru"
    order: Literal["fcfs", "priority", "lpm", "sjf", "slo"] = "fcfs"
    order_window: int = 4096
    oldest_share: float = 0.05
    oldest_age: float = 60.0
    fairness_tokens: int = 16384
    max_predicted_ttft: float | None = None
    schedule_policy: Literal["auto", "throttle", "classic", "steady"] = "auto"
    prefill_spread: int = 12
    prefill_floor: int = 128
    max_num_batched_rows: int | None = None
    served_model_name: str | None = None
    seed: int = 0
    layer_layout: list[int] | None = None
    layer_rebalance: Literal["off", "asked", "auto"] = "off"
    movable_layers: int = 2
    devices: list[str] | None = None
    transport: Literal["auto", "peer", "nccl"] = "auto"
    threads: int | None = None
    step_timeout: float = 600.0
    profile_seconds: float = 3.0
    record_steps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, Path):
            msgspec.structs.force_setattr(self, "model", Path(self.model))
        stages = self.pipeline_parallel_size
        _check_int(stages, 1, 1024, "--pipeline-parallel-size")
        _check_int(self.tensor_parallel_size, 1, 1024, "--tensor-parallel-size")
        _check_choice(self.dtype, ("auto", "float32", "bfloat16", "float16"), "--dtype")
        _check_choice(self.load_format, ("auto", "dummy"), "--load-format")
        _check_choice(self.cache_eviction, ("lru", "fifo"), "--cache-eviction")
        _check_choice(self.order, ORDERS, "--order")
        _check_int(self.order_window, 1, 1 << 20, "--order-window")
        _check_float(self.oldest_share, 0.0, 1.0, "--oldest-share")
        _check_float(self.oldest_age, 0.0, 1e6, "--oldest-age")
        _check_int(self.fairness_tokens, 1, 1 << 40, "--fairness-tokens")
        if self.max_predicted_ttft is not None:
            _check_float(self.max_predicted_ttft, 1e-3, 1e6, "--max-predicted-ttft")
        _check_choice(self.attention, ("auto", "triton", "flashinfer"), "--attention")
        policies = ("auto", "throttle", "classic", "steady")
        _check_choice(self.schedule_policy, policies, "--schedule-policy")
        _check_int(self.prefill_spread, 1, 1 << 10, "--prefill-spread")
        _check_int(self.prefill_floor, 1, 1 << 20, "--prefill-floor")
        if self.max_num_batched_rows is not None:
            _check_int(self.max_num_batched_rows, 1, 1 << 16, "--max-num-batched-rows")
        _check_int(self.page_size, 1, 1024, "--page-size")
        if self.page_size & (self.page_size - 1):
            raise ConfigError(
                f"--page-size must be a power of two such as 16, not {self.page_size}.",
                "--page-size",
            )
        if self.num_kv_pages is not None:
            _check_int(self.num_kv_pages, 1, 1 << 31, "--num-kv-pages")
        if self.kv_memory is not None:
            _check_int(self.kv_memory, 1, 1 << 60, "--kv-memory")
        _check_choice(self.device, ("auto", "cpu", "cuda"), "--device")
        _check_choice(self.transport, ("auto", "peer", "nccl"), "--transport")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "--gpu-memory-utilization must be above 0 and at most 1, not "
                f"{self.gpu_memory_utilization}.",
                "--gpu-memory-utilization",
            )
        _check_int(self.max_num_seqs, 1, 1 << 16, "--max-num-seqs")
        _check_int(self.max_num_batched_tokens, 1, 1 << 20, "--max-num-batched-tokens")
        if self.max_model_len is not None:
            _check_int(self.max_model_len, 2, 1 << 24, "--max-model-len")
        if self.threads is not None:
            _check_int(self.threads, 1, 4096, "--threads")
        if not self.step_timeout > 0:
            raise ConfigError(
                "--step-timeout must be a number of seconds above 0.", "--step-timeout"
            )
        if self.devices is not None:
            _check_devices(self.devices, stages, self.tensor_parallel_size)
        _check_float(self.profile_seconds, 0.0, 600.0, "--profile-seconds")
        _check_choice(self.layer_rebalance, ("off", "asked", "auto"), "--layer-rebalance")
        _check_int(self.movable_layers, 1, 1024, "--movable-layers")
        layout = self.layer_layout
        if layout is not None and (len(layout) != stages or min(layout, default=0) < 1):
            raise ConfigError(
                f"--layer-layout must give at least one layer for each of the {stages} "
                f"pipeline stages, not {layout}.",
                "--layer-layout",
            )

    @property
    def name(self) -> str:
        """The name under which the model is served."""
        return self.served_model_name or self.model.name

    @property
    def policy(self) -> str:
        """The schedule policy that is meant, `auto` resolved."""
        if self.schedule_policy != "auto":
            return self.schedule_policy
        return "throttle" if self.pipeline_parallel_size > 1 else "classic"

    @property
    def movable(self) -> int:
        """By how many layers a bound between two stages may move."""
        may_move = self.layer_rebalance != "off" and self.pipeline_parallel_size > 1
        return self.movable_layers if may_move else 0

    def stage_device(self, stage: int, rank: int = 0) -> str:
        """The torch device of one rank of a stage, or "auto"."""
        worker = stage * self.tensor_parallel_size + rank
        if self.devices is not None:
            return self.devices[worker]
        return f"cuda:{worker}" if self.device == "cuda" else self.device


def _check_int(value: int, low: int, high: int, flag: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{flag} must be a whole number, not {value!r}.", flag)
    if not low <= value <= high:
        raise ConfigError(f"{flag} must be between {low} and {high}, not {value}.", flag)


def _check_float(value: float, low: float, high: float, flag: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{flag} must be a number from {low} to {high}, not {value!r}.", flag)


def _check_choice(value: str, choices: tuple[str, ...], flag: str) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, not {value!r}.", flag)


def _check_devices(devices: list[str], stages: int, ranks: int) -> None:
    flag = "--devices"
    if len(devices) != stages * ranks:
        each, ranked = "a stage", ""
        if ranks > 1:
            each, ranked = "a rank, those of stage 0 first", f" of {ranks} ranks"
        raise ConfigError(
            f"{flag} names {len(devices)} devices for {stages} pipeline stages{ranked}; "
            f"give one device {each}.",
            flag,
        )
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise ConfigError(
                f"{flag} names {device!r}, which is no device; give cpu, or GPUs by their numbers "
                "such as cuda:0,cuda:1.",
                flag,
            )
    for stage in range(stages):
        own = devices[stage * ranks : (stage + 1) * ranks]
        if len({device.partition(":")[0] for device in own}) > 1:
            raise ConfigError(
                f"{flag} gives the ranks of stage {stage} devices of different kinds "
                f"({', '.join(own)}); the ranks of one stage need the same kind.",
                flag,
            )
        if own[0] != "cpu" and len(set(own)) < ranks:
            raise ConfigError(
                f"{flag} gives ranks of stage {stage} the same device ({', '.join(own)}); each "
                "rank needs a GPU of its own.",
                flag,
            )


def encode_path(value: Any) -> str:
    """For msgspec: how a path is written."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot encode {type(value).__name__}")


def decode_path(kind: type, value: Any) -> Any:
    """For msgspec: how a path is read."""
    if kind is Path:
        return Path(value)
    raise TypeError(f"cannot decode {kind}")
