"""The command `lectern bench`."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from serving.errors import ConfigError, LecternError, ModelError, OverloadedError

if TYPE_CHECKING:
    from serving.bench.loads import Load
    from serving.bench.settings import Settings


def bench(
    model: Annotated[
        str,
        typer.Option(help="Shape such as qwen3-0.6b, or a checkpoint folder, or `demo`."),
    ],
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND:N:RATE, may be given several times. N requests, RATE of them a second on "
            "average, 0 = all at once. KIND: chat (mean 300 tokens in, 244 out), long (2124, "
            "239), code (2503, 41), or fixed-IN-OUT with the same lengths for all requests."
        ),
    ] = None,
    trace: Annotated[
        str,
        typer.Option(
            help="Instead of --load: a file in Azure's (csv) or Mooncake's (jsonl) format, or of "
            "agent calls (tar.gz).",
            show_default=False,
        ),
    ] = "",
    requests: Annotated[
        int, typer.Option(help="Only so many requests of the trace, from its start; 0: all.")
    ] = 0,
    mix: Annotated[
        str,
        typer.Option(
            help="SHARE:TOKENS such as 0.1:8192: a tenth of the trace's requests, drawn by the "
            "seed, get prompts of that length.",
            show_default=False,
        ),
    ] = "",
    rate: Annotated[
        float,
        typer.Option(
            help="Requests a second on average, by stretching the trace's times; 0: its own. With "
            "--goodput the first rate that is tried; 0: by the time of lone prefills."
        ),
    ] = 0.0,
    time_scale: Annotated[
        float,
        typer.Option(
            help="Multiply the trace's times, so that 2 halves its rate.", show_default=False
        ),
    ] = 0.0,
    order: Annotated[
        list[str] | None,
        typer.Option(
            help="Order of service for --trace, as for `lectern serve`; may be given several "
            "times, and every one is run in an engine of its own.",
            show_default="fcfs",
        ),
    ] = None,
    slo_ttft: Annotated[
        str,
        typer.Option(
            help="Target of the time to first token in seconds, such as 2, 2+0.001*tokens or "
            "max(2,5*own) with `own` the measured time of its uncached prefill alone; or none."
        ),
    ] = "max(2,5*own)",
    slo_tpot: Annotated[
        str, typer.Option(help="Target of the seconds for each further token, or none.")
    ] = "0.1",
    goodput: Annotated[
        bool,
        typer.Option(
            "--goodput",
            help="Look for the highest rate at which 90 % of all requests and 80 % of each "
            "length class meet their targets.",
        ),
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="For --goodput: how long requests arrive at each rate.")
    ] = 90.0,
    rates: Annotated[
        int, typer.Option(help="For --goodput: how many rates are tried at most.")
    ] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a row on standard output.")
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
        typer.Option(
            help="Context; 0: 12288 as the peer's, or what fixed loads need; for a trace what its "
            "longest request needs, as far as the model goes."
        ),
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
    layer_layout: Annotated[
        str, typer.Option(help="Layers of each stage, such as 10,9,9,8.", show_default=False)
    ] = "",
    layer_rebalance: Annotated[
        str, typer.Option(help="off, or auto to let layers move between stages.")
    ] = "off",
    movable_layers: Annotated[
        int, typer.Option(help="Layers by which a bound between two stages may move.")
    ] = 2,
    move_every: Annotated[
        float,
        typer.Option(
            help="For --load: move a layer between the two middle stages and back every so many "
            "seconds; the row tells how long moves take and the longest wait between two tokens.",
            show_default=False,
        ),
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
    timeline: Annotated[
        str,
        typer.Option(
            help="SVG file to be written: what each stage did when, for one load, or one order "
            "and rate of a trace.",
            show_default=False,
        ),
    ] = "",
    timeline_window: Annotated[
        str,
        typer.Option(
            help="Part of the run that --timeline shows: SECONDS about its middle, or START:END; "
            "by default 60 micro-batches.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of lengths and arrivals.")] = 0,
) -> None:
    """Run loads, or a recorded one, against an engine and print their figures.

    Conditions of --load: temperature 1.0, ignore_eos, random prompts, prefix cache off, no text
    made of the tokens in process, every requested token counted. Before the first load the engine
    is warmed up with 64 chat requests; when all loads are fixed ones, with two requests of the
    first load's prompt and eight tokens out instead.

    Conditions of --trace: the same but for the prefix cache, which is on where prompts share
    beginnings, and the arrivals, which wait for nobody. A refused request counts as missed, one
    longer than the context is dropped. Warmed up with 16 requests of 128 tokens in and 16 out.
    Prefills of a few lengths are then timed alone, for `own`; the first order's times count for
    all.
    """
    from serving.bench.moves import ForcedMoves
    from serving.bench.settings import Settings, TraceSettings
    from serving.bench.targets import BenchError
    from serving.bench.timeline import Picture
    from serving.cli import fail, parse_devices, parse_layout, parse_rebalance

    if seed < 0:
        fail(ConfigError(f"--seed must be at least 0, not {seed}.", "--seed"))
    wanted = TraceSettings(
        trace=trace,
        mix=mix,
        requests=requests,
        rate=rate,
        time_scale=time_scale,
        orders=order or [],
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        goodput=goodput,
        seconds=seconds,
        rates=rates,
    )
    loads = load or []
    try:
        wanted.check(loads=bool(load), url=bool(url))
        layout = parse_layout(layer_layout)
        rebalance = parse_rebalance(layer_rebalance, pipeline_parallel_size)
        if timeline and (url or goodput):
            other = "--url" if url else "--goodput"
            raise ConfigError(
                f"--timeline draws one run of an engine in this process; leave {other}.",
                "--timeline",
            )
        if move_every:
            ForcedMoves.check(
                move_every, pipeline_parallel_size, layer_rebalance, other=bool(url or trace)
            )
            rebalance = "asked"
        picture = Picture.asked(timeline, timeline_window, len(loads or order or ["fcfs"]))
    except ConfigError as refused:
        fail(refused)
    fixed = all(text.startswith("fixed-") for text in loads)
    settings = Settings(
        model=model,
        loads=loads,
        url=url,
        key=api_key,
        as_json=as_json,
        matmul=fixed and not url if matmul is None else matmul,
        seed=seed,
        kv_memory=kv_memory,
        picture=picture,
        move_every=move_every,
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
            "layer_layout": layout,
            "layer_rebalance": rebalance,
            "movable_layers": movable_layers,
            "threads": threads or None,
            "record_steps": picture is not None,
        },
    )
    try:
        if trace:
            from serving.bench.trace_run import run_trace

            asyncio.run(run_trace(settings, wanted))
        else:
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
    except (BenchError, OverloadedError) as error:
        print(f"lectern: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except LecternError as error:
        fail(error)


async def _bench(settings: Settings) -> None:
    from serving.bench.loads import context_needed, parse_load, warm_up
    from serving.bench.matmul import matmul_seconds
    from serving.bench.moves import ForcedMoves
    from serving.bench.runner import run_load, stage_shares
    from serving.bench.settings import circumstances, kv_memory, print_row, say
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
            kv_memory=kv_memory(settings, [load.lengths for load in loads], model),
            **{**settings.engine, "max_model_len": context},
        )
        if settings.matmul:
            for load in loads:
                say(f"{load.text}: timing its matrix products alone ...")
                products[load.text] = matmul_seconds(
                    folder,
                    load.lengths,
                    config.dtype,
                    config.max_num_batched_tokens,
                    config.threads,
                )
        began = time.monotonic()
        forced = ForcedMoves(settings.move_every) if settings.move_every else None
        target = await InProcess.start(config, say, forced)
        say(f"The engine is ready after {time.monotonic() - began:.1f} s.")
    try:
        await run_load(target, warm_up(loads), model.vocab_size, say)
        for load in loads:
            before, began = target.stages(), time.monotonic()
            async with target.moving():
                figures = await run_load(target, load, model.vocab_size, say)
            shares = stage_shares(before, target.stages())
            for stage, share in enumerate(shares):
                parts = ", ".join(f"{kind} {part} %" for kind, part in share.items())
                say(f"{load.text}: stage {stage}: {parts}")
            head = {
                "engine": "lectern",
                "pp": settings.engine["pipeline_parallel_size"],
                "tp": settings.engine["tensor_parallel_size"],
                "model": name,
                "load": load.text,
            }
            row = {**head, **figures, **circumstances(settings)}
            product = products.get(load.text)
            row |= target.moves()
            row["stages_percent"] = shares
            row["prediction_error_percent"] = [
                None if error is None else round(100 * error, 2)
                for error in target.prediction_errors()
            ]
            row["matmul_s"] = None if product is None else round(product, 3)
            print_row(row, settings.as_json)
            if settings.picture is not None:
                await target.draw(settings.picture, began, f"{name}, measured: {load.text}")
    finally:
        await target.close()
