"""The command `lectern bench`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from serving.errors import ConfigError, LecternError, ModelError

if TYPE_CHECKING:
    from serving.bench.loads import Load
    from serving.config.model import ModelConfig


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    model: str
    loads: list[str]
    url: str
    key: str
    as_json: bool
    matmul: bool
    seed: int
    kv_memory: str
    engine: dict[str, Any]


def bench(
    model: Annotated[
        str,
        typer.Option(help="Shape such as qwen3-0.6b, or a checkpoint folder, or `demo`."),
    ],
    load: Annotated[
        list[str],
        typer.Option(
            help="KIND:N:RATE, may be given several times. N requests, RATE of them a second on "
            "average, 0 = all at once. KIND: chat (mean 300 tokens in, 244 out), long (2124, "
            "239), code (2503, 41), or fixed-IN-OUT with the same lengths for all requests."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a load on standard output.")
    ] = False,
    url: Annotated[
        str,
        typer.Option(help="Address of a running server; without it an engine runs in process."),
    ] = "",
    api_key: Annotated[
        str, typer.Option(envvar="LECTERN_API_KEY", help="Key for --url.", show_default=False)
    ] = "",
    load_format: Annotated[
        str, typer.Option(help="auto reads safetensors; dummy makes random weights.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    pipeline_parallel_size: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Ranks of a stage, which share out every layer.")
    ] = 1,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that may run at once.")] = 1024,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens in one micro-batch; `lectern serve` takes 512.")
    ] = 2048,
    max_model_len: Annotated[
        int,
        typer.Option(help="Context; 0: 12288 as the peer's, or what fixed loads need."),
    ] = 0,
    kv_memory: Annotated[
        str,
        typer.Option(help="KV cache such as 4G; default: what the loads need, if it is there."),
    ] = "",
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")
    ] = "auto",
    devices: Annotated[
        str,
        typer.Option(
            help="One torch device a rank, those of stage 0 first, such as cuda:0,cuda:1; stages "
            "may share one.",
            show_default=False,
        ),
    ] = "",
    transport: Annotated[
        str, typer.Option(help="How stages on GPUs are linked: auto, peer or nccl.")
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory that the engine may use in all.")
    ] = 0.9,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Record small steps on a GPU."),
    ] = True,
    attention: Annotated[
        str, typer.Option(help="Kernels for long prompts on a GPU: auto, triton or flashinfer.")
    ] = "auto",
    schedule_policy: Annotated[
        str,
        typer.Option(
            help="throttle, classic or steady, as for `lectern serve`; auto is throttle for "
            "several stages, classic for one."
        ),
    ] = "auto",
    prefill_spread: Annotated[
        int, typer.Option(help="For throttle: micro-batches for 2,048 waiting prompt tokens.")
    ] = 12,
    prefill_floor: Annotated[
        int, typer.Option(help="For throttle: tokens that a micro-batch may always have.")
    ] = 128,
    max_num_batched_rows: Annotated[
        int, typer.Option(help="Rows of one micro-batch; 0: as --max-num-seqs.")
    ] = 0,
    page_size: Annotated[int, typer.Option(help="Tokens in one KV page.")] = 16,
    threads: Annotated[
        int, typer.Option(help="Compute threads of each rank; 0: the cores are shared out.")
    ] = 0,
    matmul: Annotated[
        bool | None,
        typer.Option(
            "--matmul/--no-matmul",
            help="Time the load's matrix products alone, as matmul_s in the row; default: for "
            "fixed loads only, as it takes long where requests differ.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of lengths and arrivals.")] = 0,
) -> None:
    """Run loads against an engine and print their figures.

    Conditions: temperature 1.0, ignore_eos, random prompts, prefix cache off, no text made of the
    tokens in process, every requested token counted. Before the first load the engine is warmed up
    with 64 chat requests; when all loads are fixed ones, with two requests of the first load's
    prompt and eight tokens out instead.
    """
    from serving.bench.targets import BenchError
    from serving.cli import fail, parse_devices

    if seed < 0:
        fail(ConfigError(f"--seed must be at least 0, not {seed}.", "--seed"))
    fixed = all(text.startswith("fixed-") for text in load)
    settings = Settings(
        model=model,
        loads=load,
        url=url,
        key=api_key,
        as_json=as_json,
        matmul=fixed and not url if matmul is None else matmul,
        seed=seed,
        kv_memory=kv_memory,
        engine={
            "pipeline_parallel_size": pipeline_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "load_format": load_format,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_model_len": max_model_len or None,
            "page_size": page_size,
            "device": device,
            "devices": parse_devices(devices),
            "transport": transport,
            "gpu_memory_utilization": gpu_memory_utilization,
            "cuda_graphs": cuda_graphs,
            "attention": attention,
            "schedule_policy": schedule_policy,
            "prefill_spread": prefill_spread,
            "prefill_floor": prefill_floor,
            "max_num_batched_rows": max_num_batched_rows or None,
            "threads": threads or None,
        },
    )
    try:
        asyncio.run(_bench(settings))
    except BaseExceptionGroup as group:
        ours, others = group.split(LecternError)
        if others is not None or ours is None:
            raise
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"lectern: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except BenchError as error:
        print(f"lectern: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except LecternError as error:
        fail(error)


async def _bench(settings: Settings) -> None:
    from serving.bench.loads import context_needed, parse_load, warm_up
    from serving.bench.matmul import matmul_seconds
    from serving.bench.runner import run_load, stage_shares
    from serving.bench.targets import InProcess, Remote, Target
    from serving.cli import resolve_model
    from serving.config.engine import EngineConfig
    from serving.config.model import ModelConfig

    loads: list[Load] = [parse_load(text, settings.seed) for text in settings.loads]
    folder, name = resolve_model(settings.model)
    model = ModelConfig.from_folder(folder)
    if model.vocab_size <= 200:
        raise ModelError(f"{name} has {model.vocab_size} tokens; a load needs more than 200.")
    products: dict[str, float] = {}
    target: Target
    if settings.url:
        target = await Remote.connect(settings.url, settings.key)
    else:
        context = settings.engine["max_model_len"] or context_needed(loads)
        config = EngineConfig(
            model=folder,
            served_model_name=name,
            enable_prefix_caching=False,
            kv_memory=_kv_memory(settings, loads, model),
            **{**settings.engine, "max_model_len": context},
        )
        if settings.matmul:
            for load in loads:
                _say(f"{load.text}: timing its matrix products alone ...")
                products[load.text] = matmul_seconds(
                    folder,
                    load.lengths,
                    config.dtype,
                    config.max_num_batched_tokens,
                    config.threads,
                )
        began = time.monotonic()
        target = await InProcess.start(config, _say)
        _say(f"The engine is ready after {time.monotonic() - began:.1f} s.")
    try:
        await run_load(target, warm_up(loads), model.vocab_size, _say)
        for load in loads:
            before = target.stages()
            figures = await run_load(target, load, model.vocab_size, _say)
            shares = stage_shares(before, target.stages())
            for stage, share in enumerate(shares):
                parts = ", ".join(f"{kind} {part} %" for kind, part in share.items())
                _say(f"{load.text}: stage {stage}: {parts}")
            head = {
                "engine": "lectern",
                "pp": settings.engine["pipeline_parallel_size"],
                "tp": settings.engine["tensor_parallel_size"],
                "model": name,
                "load": load.text,
            }
            row = {**head, **figures, **_circumstances(settings)}
            product = products.get(load.text)
            row["stages_percent"] = shares
            row["matmul_s"] = None if product is None else round(product, 3)
            _print(row, settings.as_json)
    finally:
        await target.close()


def _kv_memory(settings: Settings, loads: list[Load], model: ModelConfig) -> int | None:
    """Bytes for all sequences of the largest load that may run at once; half of what is free.

    None on a GPU, whose memory is planned at start.
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
    for load in loads:
        sizes = sorted((sum(size) // page + 2 for size in load.lengths), reverse=True)
        pages = max(pages, sum(sizes[:most]))
    dtype = model.dtype if settings.engine["dtype"] == "auto" else settings.engine["dtype"]
    item = 4 if dtype == "float32" else 2
    row = 2 * model.num_kv_heads * model.head_dim * model.num_layers * item
    return max(64 << 20, min(pages * page * row * 11 // 10, memory_available() // 2))


def _circumstances(settings: Settings) -> dict[str, Any]:
    from serving.bench.machine import commit, hardware

    local = not settings.url or urlsplit(settings.url).hostname in ("127.0.0.1", "localhost")
    return {
        "dtype": settings.engine["dtype"],
        "url": settings.url or None,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware() if local else None,
    }


def _print(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    width = max(map(len, row))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in row.items()) + "\n", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
