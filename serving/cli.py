"""The commands `lectern serve`, `lectern bench` and `lectern simulate`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.api.classes import DEFAULT_TPOT, DEFAULT_TTFT, service_classes
from serving.config.engine import EngineConfig
from serving.errors import ConfigError, LecternError

_DEFAULTS = EngineConfig(model=Path())
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a Hugging Face checkpoint, `demo` for the demo model, or a shape such as "
        "qwen3-0.6b (with --load-format dummy).",
    ),
]
Stages = Annotated[
    int, typer.Option(help="Pipeline stages: processes that each hold a run of layers.")
]
Ranks = Annotated[
    int,
    typer.Option(
        help="Ranks of a stage: processes that share out every layer between them, a GPU each."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="auto (as the checkpoint says), float32, bfloat16 or float16.")
]
LoadFormat = Annotated[
    str, typer.Option(help="auto reads safetensors; dummy makes random weights.")
]
MaxSequences = Annotated[int, typer.Option(help="Sequences that may run at once.")]
MaxBatchedTokens = Annotated[
    int, typer.Option(help="Tokens in one micro-batch: longer prompts are cut into chunks.")
]
KvPages = Annotated[
    int, typer.Option(help="Pages of the KV cache; 0: as many as --kv-memory holds.")
]
KvMemory = Annotated[
    str,
    typer.Option(
        help="Memory for the KV cache of all stages together, such as 512M or 4G; default: 1G on "
        "the CPU, and on a GPU what --gpu-memory-utilization leaves.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]
Devices = Annotated[
    str,
    typer.Option(
        help="One torch device a rank, those of stage 0 first, such as cuda:0,cuda:1; stages may "
        "share one. Default: as --device says.",
        show_default=False,
    ),
]
StageTransport = Annotated[
    str,
    typer.Option(
        help="How stages on GPUs are linked: peer (copies into the neighbour's memory), nccl, or "
        "auto (peer where the machine allows it)."
    ),
]
GpuMemory = Annotated[
    float, typer.Option(help="Share of a GPU's memory that the engine may use in all.")
]
Attention = Annotated[
    str,
    typer.Option(
        help="On a GPU: kernels for long prompts. auto takes flashinfer where it is installed and "
        "measured faster at start, else triton."
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="Record small steps on a GPU at start."),
]
Policy = Annotated[
    str,
    typer.Option(
        help="throttle meters prompt tokens and decodes apart, so that all micro-batches cost "
        "alike; classic fills every micro-batch; steady lets prompts ride along with decodes in "
        "small pieces while few wait; auto is throttle for several stages, classic for one."
    ),
]
PrefillSpread = Annotated[
    int,
    typer.Option(
        help="For throttle: 2,048 waiting prompt tokens are spread over so many micro-batches, "
        "four times as many tokens over twice as many. More lets decodes come more evenly, less "
        "brings first tokens sooner."
    ),
]
PrefillFloor = Annotated[
    int,
    typer.Option(
        help="For throttle: prompt tokens may always fill a micro-batch up to so many tokens, "
        "decodes counted, as its time hardly grows until then."
    ),
]
MaxRows = Annotated[
    int,
    typer.Option(help="Decodes and prompts together in one micro-batch; 0: as --max-num-seqs."),
]
LayerLayout = Annotated[
    str,
    typer.Option(
        help="Layers of each stage, such as 10,9,9,8; default: evenly.", show_default=False
    ),
]
LayerRebalance = Annotated[
    str,
    typer.Option(
        help="auto lets layers move between stages while requests run, when that is predicted to "
        "make the slowest stage faster; off keeps the layout."
    ),
]
MovableLayers = Annotated[
    int,
    typer.Option(
        help="For --layer-rebalance auto: by how many layers a bound between two stages may move; "
        "both stages hold their weights and keep room for their KV."
    ),
]
ProfileSeconds = Annotated[
    float,
    typer.Option(
        help="Where --order slo, --max-predicted-ttft or --layer-rebalance auto depend on step "
        "times of which none are kept yet: seconds for measuring them at start; 0: none."
    ),
]
PageSize = Annotated[int, typer.Option(help="Tokens in one KV page, a power of two.")]
Seed = Annotated[
    int, typer.Option(help="Seed of random weights (--load-format dummy); requests have their own.")
]
Threads = Annotated[
    int, typer.Option(help="Compute threads of each rank; 0: the cores are shared out.")
]
Order = Annotated[
    str,
    typer.Option(
        help="Which waiting prompt is served next. fcfs: by arrival; priority: by the header "
        "X-Lectern-Priority, smaller first; lpm: the longest prefix in the cache first; sjf: the "
        "shortest prompt first; slo: fair between tenants, so that as many requests as "
        "possible meet their targets."
    ),
]
OrderWindow = Annotated[
    int,
    typer.Option(
        help="For slo: so many of the oldest waiting prompts are put in order, and half of those "
        "beyond; the rest stay by arrival."
    ),
]
OldestShare = Annotated[
    float,
    typer.Option(
        help="For slo: share of the prompt tokens that the oldest waiting prompt gets once it is "
        "older than --oldest-age."
    ),
]
OldestAge = Annotated[
    float, typer.Option(help="For slo: age in seconds from which --oldest-share counts.")
]
FairnessTokens = Annotated[
    int,
    typer.Option(
        help="For slo: tokens by which a tenant may be ahead of another that waits; a token of an "
        "answer counts as two of a prompt."
    ),
]
MaxPredictedTtft = Annotated[
    float,
    typer.Option(
        help="Refuse a request with 429 when its first token is predicted to take longer than so "
        "many seconds; 0: never refuse."
    ),
]
SloTtft = Annotated[
    str,
    typer.Option(
        help="Target of the time to the first token for requests that name no class: seconds such "
        "as 2; 2+0.001*tokens adds some for each prompt token; max(2,5*own) is 2, or 5 times the "
        "predicted time of its own uncached prefill if that is longer; none: best effort."
    ),
]
SloTpot = Annotated[
    str,
    typer.Option(
        help="Target for each token after the first of requests that name no class, in seconds; "
        "none: best effort."
    ),
]
SloClass = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TTFT,TPOT",
        help="Targets of requests that name this class in the header X-Lectern-Class; may be "
        "given several times. Built in: interactive=0.5+0.0005*tokens,0.05 and batch=none,none.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands `serve`, `bench` and `simulate`."""
    from serving.bench.command import bench
    from serving.simulation.command import simulate

    app.command("serve")(serve)
    app.command("bench")(bench)
    app.command("simulate")(simulate)


def serve(
    model: ModelArgument,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Anyone who reaches it may use the engine."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8100,
    pipeline_parallel_size: Stages = 1,
    tensor_parallel_size: Ranks = 1,
    dtype: Dtype = "auto",
    served_model_name: Annotated[
        str, typer.Option(help="Name of the model in the API; default: the folder's name.")
    ] = "",
    load_format: LoadFormat = "auto",
    max_model_len: Annotated[
        int, typer.Option(help="Longest prompt plus answer in tokens; 0: as the model.")
    ] = 0,
    max_num_seqs: MaxSequences = 256,
    max_num_batched_tokens: MaxBatchedTokens = 512,
    num_kv_pages: KvPages = 0,
    kv_memory: KvMemory = "",
    device: Device = "auto",
    devices: Devices = "",
    transport: StageTransport = "auto",
    gpu_memory_utilization: GpuMemory = 0.9,
    cuda_graphs: CudaGraphs = True,
    attention: Attention = "auto",
    schedule_policy: Policy = "auto",
    prefill_spread: PrefillSpread = 12,
    prefill_floor: PrefillFloor = 128,
    max_num_batched_rows: MaxRows = 0,
    layer_layout: LayerLayout = "",
    layer_rebalance: LayerRebalance = _DEFAULTS.layer_rebalance,
    movable_layers: MovableLayers = _DEFAULTS.movable_layers,
    profile_seconds: ProfileSeconds = _DEFAULTS.profile_seconds,
    page_size: PageSize = 16,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep the KV of prompts for requests that begin alike.",
        ),
    ] = True,
    order: Order = _DEFAULTS.order,
    order_window: OrderWindow = _DEFAULTS.order_window,
    oldest_share: OldestShare = _DEFAULTS.oldest_share,
    oldest_age: OldestAge = _DEFAULTS.oldest_age,
    fairness_tokens: FairnessTokens = _DEFAULTS.fairness_tokens,
    max_predicted_ttft: MaxPredictedTtft = _DEFAULTS.max_predicted_ttft or 0,
    slo_ttft: SloTtft = DEFAULT_TTFT,
    slo_tpot: SloTpot = DEFAULT_TPOT,
    slo_class: SloClass = None,
    threads: Threads = 0,
    seed: Seed = 0,
) -> None:
    """Start one engine alone, with an OpenAI-style API."""
    from serving.api.logs import set_up_logs

    set_up_logs()
    try:
        from serving.api.server import listen, run
        from serving.config.model import ModelConfig

        listening = listen(host, port)
        folder, name = resolve_model(model)
        config = engine_config(
            model=folder,
            served_model_name=served_model_name or name,
            pipeline_parallel_size=pipeline_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            load_format=load_format,
            max_model_len=max_model_len or None,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_kv_pages=num_kv_pages or None,
            kv_memory=parse_size(kv_memory, "--kv-memory") if kv_memory else None,
            device=device,
            devices=parse_devices(devices),
            transport=transport,
            gpu_memory_utilization=gpu_memory_utilization,
            cuda_graphs=cuda_graphs,
            attention=attention,
            schedule_policy=schedule_policy,
            prefill_spread=prefill_spread,
            prefill_floor=prefill_floor,
            max_num_batched_rows=max_num_batched_rows or None,
            layer_layout=parse_layout(layer_layout),
            layer_rebalance=parse_rebalance(layer_rebalance, pipeline_parallel_size),
            movable_layers=movable_layers,
            profile_seconds=profile_seconds,
            page_size=page_size,
            enable_prefix_caching=enable_prefix_caching,
            order=order,
            order_window=order_window,
            oldest_share=oldest_share,
            oldest_age=oldest_age,
            fairness_tokens=fairness_tokens,
            max_predicted_ttft=max_predicted_ttft or None,
            threads=threads or None,
            seed=seed,
        )
        classes = service_classes(slo_ttft, slo_tpot, slo_class or ())
        ModelConfig.from_folder(folder)
        run(config, listening, classes)
    except LecternError as error:
        fail(error)


def fail(error: LecternError) -> None:
    """Say what is wrong in one sentence and leave with the right exit code."""
    from serving.api.server import exit_code

    print(f"lectern: {error}", file=sys.stderr)
    raise typer.Exit(exit_code(error)) from None


def resolve_model(model: str) -> tuple[Path, str]:
    """Folder and default name of what the user calls a model. Raises ConfigError."""
    from serving.bench.shapes import shape_folder

    folder = Path(model).expanduser()
    if model == "demo" and not folder.is_dir():
        from serving.demo_model.make import demo_model, served_name

        return demo_model(_home(), _say), served_name()
    shape = None if folder.exists() else shape_folder(model)
    if shape is not None:
        return shape, model
    folder = folder.resolve()
    return folder, folder.name


def engine_config(**settings: Any) -> Any:
    """An EngineConfig; its own checks raise ConfigError."""
    from serving.config.engine import EngineConfig

    return EngineConfig(**settings)


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as 4G, 512MiB or 1.5g; units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ConfigError(f"{flag} must be a size such as 512M or 4G, not {text!r}.", flag)
    return int(float(found[1]) * _UNITS[found[2]])


def parse_devices(text: str) -> list[str] | None:
    """The names in a list such as cuda:0,cuda:1; None for an empty one."""
    return [name.strip() for name in text.split(",")] if text else None


def parse_layout(text: str) -> list[int] | None:
    """The numbers in a list such as 10,9,9,8; None for an empty one. Raises ConfigError."""
    if not text:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--layer-layout must be numbers such as 10,9,9,8, not {text!r}.", "--layer-layout"
        ) from None


def parse_rebalance(text: str, stages: int) -> str:
    """off or auto. Raises ConfigError."""
    flag = "--layer-rebalance"
    if text not in ("off", "auto"):
        raise ConfigError(f"{flag} must be off or auto, not {text!r}.", flag)
    if text == "auto" and stages < 2:
        raise ConfigError(
            f"{flag} auto moves layers between pipeline stages, and there is one; give "
            "--pipeline-parallel-size 2 or more.",
            flag,
        )
    return text


def _home() -> Path:
    import os

    return Path(os.environ.get("LECTERN_HOME") or Path.home() / ".lectern")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
