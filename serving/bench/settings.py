"""What the command line of `lectern bench` asked for, the memory for it, and the rows it gives."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.bench.timeline import Picture
    from serving.config.model import ModelConfig


@dataclass(frozen=True)
class Settings:
    """What loads and traces have in common."""

    model: str
    loads: list[str]
    url: str
    key: str
    as_json: bool
    matmul: bool
    seed: int
    kv_memory: str
    engine: dict[str, Any]
    picture: Picture | None = None
    move_every: float = 0.0


@dataclass(frozen=True)
class TraceSettings:
    """What belongs to --trace alone; 0 and empty mean that it was not given."""

    trace: str
    mix: str
    requests: int
    rate: float
    time_scale: float
    orders: list[str]
    slo_ttft: str
    slo_tpot: str
    goodput: bool
    seconds: float
    rates: int

    def check(self, *, loads: bool, url: bool) -> None:
        """Raise ConfigError naming the first flag that cannot be."""
        given = {
            "--mix": bool(self.mix),
            "--requests": self.requests != 0,
            "--rate": self.rate != 0,
            "--time-scale": self.time_scale != 0,
            "--order": bool(self.orders),
            "--goodput": self.goodput,
        }
        if not self.trace:
            if not loads:
                raise ConfigError("Give --load KIND:N:RATE or --trace FILE.", "--load")
            for flag in (flag for flag, there in given.items() if there):
                raise ConfigError(f"{flag} belongs to --trace; give a file with it.", flag)
            return
        if loads:
            raise ConfigError("Give either --load or --trace, not both.", "--trace")
        if self.rate and self.time_scale:
            raise ConfigError("Give either --rate or --time-scale, not both.", "--time-scale")
        if self.goodput and self.time_scale:
            raise ConfigError(
                "--goodput looks for the rate itself; give --rate to say where it starts, and no "
                "--time-scale.",
                "--time-scale",
            )
        if url and self.orders:
            raise ConfigError(
                "--order is for an engine in this process; the server at --url was started with "
                "its own.",
                "--order",
            )
        for flag, value, least in (
            ("--requests", self.requests, 0),
            ("--rate", self.rate, 0),
            ("--time-scale", self.time_scale, 0),
            ("--seconds", self.seconds, 1),
            ("--rates", self.rates, 1),
        ):
            if not least <= value < math.inf:
                raise ConfigError(f"{flag} must be at least {least}, not {value}.", flag)


def kv_memory(
    settings: Settings, loads: Sequence[Sequence[tuple[int, int]]], model: ModelConfig
) -> int | None:
    """Bytes for all sequences of the largest load that may run at once; half of what is free.

    `loads` has (tokens in, tokens out) of each request. None on a GPU, whose memory is planned at
    start.
    """
    from serving.bench.machine import memory_available, on_gpu
    from serving.cli import parse_size

    if settings.kv_memory:
        return parse_size(settings.kv_memory, "--kv-memory")
    if on_gpu(settings.engine["device"]):
        return None
    page = settings.engine["page_size"]
    if not isinstance(page, int) or page < 1:
        raise ConfigError("--page-size must be a power of two such as 16.", "--page-size")
    most: int = settings.engine["max_num_seqs"]
    pages = 0
    for lengths in loads:
        sizes = sorted((sum(size) // page + 2 for size in lengths), reverse=True)
        pages = max(pages, sum(sizes[:most]))
    dtype = model.dtype if settings.engine["dtype"] == "auto" else settings.engine["dtype"]
    item = 4 if dtype == "float32" else 2
    row = 2 * model.num_kv_heads * model.head_dim * _layers_with_kv(settings, model) * item
    return max(64 << 20, min(pages * page * row * 11 // 10, memory_available() // 2))


def _layers_with_kv(settings: Settings, model: ModelConfig) -> int:
    """Those of all stages, where layers may move with those that may come."""
    from serving.config.engine import EngineConfig
    from serving.core import Layout

    config = EngineConfig(model=model.folder, **settings.engine)
    stages = config.pipeline_parallel_size
    if stages > model.num_layers:
        return model.num_layers  # refused at start
    home = Layout.even(model.num_layers, stages)
    if config.layer_layout is not None:
        home = Layout.of_counts(config.layer_layout)
    return sum(len(home.resident(stage, config.movable)) for stage in range(stages))


def circumstances(settings: Settings) -> dict[str, Any]:
    """What a row says about where and when it was measured."""
    from serving.bench.machine import commit, hardware

    local = not settings.url or urlsplit(settings.url).hostname in ("127.0.0.1", "localhost")
    return {
        "dtype": settings.engine["dtype"],
        "url": settings.url or None,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware() if local else None,
    }


def print_row(row: dict[str, Any], as_json: bool) -> None:
    """One row on standard output: an object on a line, or a table of two columns for people."""
    if as_json:
        print(json.dumps(row), flush=True)
        return
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "classes":
            for part, figures in value.items():
                flat[f"  {part}"] = ", ".join(f"{key} {found}" for key, found in figures.items())
        else:
            flat[name] = value
    width = max(map(len, flat))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in flat.items()) + "\n", flush=True)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
