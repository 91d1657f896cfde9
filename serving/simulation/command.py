"""The command `lectern simulate`."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.config.engine import EngineConfig
from serving.errors import ConfigError, LecternError

if TYPE_CHECKING:
    from serving.bench.timeline import Picture
    from serving.simulation.pipeline import Arrival, Step

_DEFAULTS = EngineConfig(model=Path())


def simulate(
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND:N:RATE as for `lectern bench`, may be given several times. With --trace a "
            "number: 1.0 is the rate at which the trace, started all at once under fcfs, would "
            "finish in its own duration; without it the trace's own times."
        ),
    ] = None,
    trace: Annotated[
        str, typer.Option(help="File in Azure's (csv) or Mooncake's (jsonl) format.")
    ] = "",
    requests: Annotated[
        int, typer.Option(help="Only so many requests of the trace, from its start; 0: all.")
    ] = 0,
    profile: Annotated[
        str,
        typer.Option(help="Step times: qwen3-8b-h200, qwen3-32b-h200, or a JSON file."),
    ] = "qwen3-8b-h200",
    stages: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    layer_layout: Annotated[
        str, typer.Option(help="Layers of each stage, such as 10,9,9,8.", show_default=False)
    ] = "",
    layer_rebalance: Annotated[
        str,
        typer.Option(
            help="auto lets layers move to the stages that are predicted to be done first, at no "
            "cost; off keeps the layout."
        ),
    ] = "off",
    mix: Annotated[
        str,
        typer.Option(
            help="SHARE:TOKENS such as 0.1:8192: a share of the trace's requests, drawn by the "
            "seed, gets prompts of so many tokens.",
            show_default=False,
        ),
    ] = "",
    order: Annotated[
        list[str] | None,
        typer.Option(
            help="Order of service: fcfs, priority, lpm, sjf or slo; may be given several times.",
            show_default="fcfs",
        ),
    ] = None,
    slo_ttft: Annotated[
        str,
        typer.Option(
            help="Target of the time to first token, in seconds: 2, 2+0.001*tokens, "
            "max(2,5*own) with own its prefill alone, or none."
        ),
    ] = "max(2,5*own)",
    slo_tpot: Annotated[
        str, typer.Option(help="Target of the seconds for each token after the first, or none.")
    ] = "0.1",
    order_window: Annotated[
        int, typer.Option(help="For slo: so many of the oldest prompts, and half of those beyond.")
    ] = _DEFAULTS.order_window,
    oldest_share: Annotated[
        float, typer.Option(help="For slo: share of the prompt tokens for the oldest prompt.")
    ] = _DEFAULTS.oldest_share,
    oldest_age: Annotated[
        float, typer.Option(help="For slo: age in seconds above which a prompt has that share.")
    ] = _DEFAULTS.oldest_age,
    schedule_policy: Annotated[
        list[str] | None,
        typer.Option(
            help="auto, throttle, classic or steady, as for `lectern serve`; may be given several "
            "times, and every one is run.",
            show_default="auto",
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens in one micro-batch; may be given several times.", show_default="2048"
        ),
    ] = None,
    prefill_spread: Annotated[
        int, typer.Option(help="For throttle: micro-batches for 2,048 waiting prompt tokens.")
    ] = 12,
    prefill_floor: Annotated[
        int, typer.Option(help="For throttle: tokens that a micro-batch may always have.")
    ] = 128,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that may run at once.")] = 1024,
    max_model_len: Annotated[
        int, typer.Option(help="Longer requests are dropped and counted.")
    ] = 131072,
    num_kv_pages: Annotated[int, typer.Option(help="Pages of the KV cache.")] = 48335,
    page_size: Annotated[int, typer.Option(help="Tokens in one KV page.")] = 16,
    known_lengths: Annotated[
        bool,
        typer.Option(
            "--known-lengths/--unknown-lengths",
            help="Whether the scheduler knows how long each answer gets, as for requests that "
            "ignore the end of sequence; else each may have --longest-answer tokens.",
        ),
    ] = True,
    longest_answer: Annotated[
        int, typer.Option(help="For --unknown-lengths: max_tokens of every request.")
    ] = 4096,
    rate: Annotated[
        float,
        typer.Option(
            help="For --trace, instead of --load: so many requests a second on average.",
            show_default=False,
        ),
    ] = 0.0,
    timeline: Annotated[
        str,
        typer.Option(
            help="SVG file to be written: what each stage did when, for one load, order, policy "
            "and budget.",
            show_default=False,
        ),
    ] = "",
    timeline_window: Annotated[
        str,
        typer.Option(
            help="Part of the run that --timeline shows: SECONDS about its middle, or START:END; "
            "by default 60 micro-batches. Where layers move, the first move takes the middle's "
            "place.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of lengths and arrivals.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a run on standard output.")
    ] = False,
) -> None:
    """Run the engine's own scheduler against predicted step times, on a virtual clock.

    Nothing is computed but the schedule, so hours of load take seconds and no GPU. Figures are
    predictions: they say what differs between policies, layouts and budgets.
    """
    from serving.bench.timeline import Picture
    from serving.cli import fail

    smallest = {"--requests": (requests, 0), "--longest-answer": (longest_answer, 1)}
    smallest["--seed"] = (seed, 0)
    for flag, (value, least) in smallest.items():
        if value < least:
            fail(ConfigError(f"{flag} must be at least {least}, not {value}.", flag))
    settings = _Settings(
        profile=profile,
        stages=stages,
        layout=layer_layout,
        rebalance=layer_rebalance,
        max_model_len=max_model_len,
        num_pages=num_kv_pages,
        known_lengths=known_lengths,
        longest_answer=longest_answer,
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        engine={
            "order_window": order_window,
            "oldest_share": oldest_share,
            "oldest_age": oldest_age,
            "max_num_seqs": max_num_seqs,
            "page_size": page_size,
            "prefill_spread": prefill_spread,
            "prefill_floor": prefill_floor,
        },
    )
    try:
        first = True
        budgets = max_num_batched_tokens or [2048]
        ways = list(product(order or ["fcfs"], schedule_policy or ["auto"], budgets))
        picture = Picture.asked(timeline, timeline_window, max(1, len(load or [])) * len(ways))
        if rate and (load or not trace or not 0 < rate < math.inf):
            raise ConfigError(
                f"--rate must be above 0, not {rate}, and belongs to --trace without --load.",
                "--rate",
            )
        for load_set in _loads(settings, load or [], trace, mix, rate, requests, seed, budgets[0]):
            for way, policy, budget in ways:
                row = _run(settings, load_set, way, policy, budget, seed, picture)
                _print(row, as_json=as_json, first=first)
                first = False
    except LecternError as error:
        fail(error)


@dataclass(frozen=True)
class _Settings:
    profile: str
    stages: int
    layout: str
    rebalance: str
    max_model_len: int
    num_pages: int
    known_lengths: bool
    longest_answer: int
    slo_ttft: str
    slo_tpot: str
    engine: dict[str, Any]


@dataclass(frozen=True)
class _LoadSet:
    """`load` is as it was given, a number for a scaled trace. `uncached` tokens of each prompt are
    left by a prefix cache that never forgets.
    """

    name: str
    load: str | float
    arrivals: list[Arrival]
    uncached: list[int]
    dropped: int
    caching: bool


def _loads(
    settings: _Settings,
    loads: list[str],
    trace: str,
    mix: str,
    rate: float,
    requests: int,
    seed: int,
    budget: int,
) -> list[_LoadSet]:
    """The loads that were asked for. Raises ConfigError."""
    if not trace:
        if not loads:
            raise ConfigError("Give --load KIND:N:RATE or --trace FILE.", "--load")
        return [_bench_load(settings, text, seed) for text in loads]
    from serving.simulation.traces import arrivals
    from serving.traces import read_trace
    from serving.traces.prompts import uncached_tokens
    from serving.traces.recorded import Mix

    whole = read_trace(Path(trace), seed, most=requests or None)
    if mix:
        whole = Mix.parse(mix).into(whole, seed)
    kept = whole.fitting(_context(settings))
    if not kept.requests:
        raise ConfigError(
            f"No request of {trace} fits into {_room(settings)}.",
            "--max-model-len",
        )
    if rate:
        kept = kept.at_rate(rate)
    base = _LoadSet(
        name=whole.name,
        load=f"{rate:g} requests a second" if rate else "as recorded",
        arrivals=arrivals(kept, seed),
        uncached=uncached_tokens(kept.requests).tolist(),
        dropped=len(whole.requests) - len(kept.requests),
        caching=whole.shares,
    )
    if not loads:
        return [base]
    factor = _capacity(settings, base, seed, budget)
    return [_scaled(base, text, factor) for text in loads]


def _bench_load(settings: _Settings, text: str, seed: int) -> _LoadSet:
    import numpy as np

    from serving.bench.loads import parse_load
    from serving.simulation.pipeline import Arrival

    load = parse_load(text, seed)
    arrivals = [
        Arrival(at, np.zeros(size[0], dtype=np.int32), size[1])
        for at, size in zip(load.arrivals, load.lengths, strict=True)
    ]
    most = _context(settings)
    kept = [one for one in arrivals if len(one.prompt) + one.tokens_out <= most]
    if not kept:
        raise ConfigError(f"No request of {text} fits into {_room(settings)}.", "--max-model-len")
    return _LoadSet(
        name=text,
        load=text,
        arrivals=kept,
        uncached=[len(one.prompt) for one in kept],
        dropped=len(arrivals) - len(kept),
        caching=False,
    )


def _room(settings: _Settings) -> str:
    return (
        f"--max-model-len {settings.max_model_len} and --num-kv-pages {settings.num_pages} of "
        f"{settings.engine['page_size']} tokens"
    )


def _context(settings: _Settings) -> int:
    """Tokens of the longest request that the engine's door would let in."""
    pages: int = settings.num_pages * settings.engine["page_size"]
    return min(settings.max_model_len, pages)


def _capacity(settings: _Settings, base: _LoadSet, seed: int, budget: int) -> float:
    """Seconds that the load takes when all of it is there at once, over its own duration."""
    at_once = [replace(one, at=0.0) for one in base.arrivals]
    load = replace(base, name=f"{base.name}, all at once", arrivals=at_once)
    row = _run(settings, load, "fcfs", "auto", budget, seed)
    duration = base.arrivals[-1].at
    if not duration:
        raise ConfigError("The trace has no duration, so --load cannot scale it.", "--load")
    return float(row["wall_s"]) / duration


def _scaled(base: _LoadSet, text: str, factor: float) -> _LoadSet:
    try:
        load = float(text)
    except ValueError:
        load = 0.0
    if not 0 < load < 1e6:
        raise ConfigError(
            f"--load {text!r} must be a number such as 0.85 when --trace is given.", "--load"
        )
    arrivals = [replace(one, at=one.at * factor / load) for one in base.arrivals]
    return replace(base, load=load, arrivals=arrivals)


def _run(
    settings: _Settings,
    load: _LoadSet,
    order: str,
    policy: str,
    budget: int,
    seed: int,
    picture: Picture | None = None,
) -> dict[str, Any]:
    from serving.cli import parse_layout, parse_rebalance
    from serving.config.service import parse_tpot, parse_ttft
    from serving.simulation.pipeline import Pipeline, simulated_config
    from serving.simulation.profile import Profile
    from serving.simulation.rebalance import Rebalancing
    from serving.simulation.report import draw_timeline, summarise
    from serving.simulation.targets import slo_figures, with_targets

    ttft, tpot = parse_ttft(settings.slo_ttft), parse_tpot(settings.slo_tpot)
    profile = Profile.load(settings.profile)
    config = simulated_config(
        settings.stages,
        order=order,
        schedule_policy=policy,
        max_num_batched_tokens=budget,
        enable_prefix_caching=load.caching,
        layer_layout=parse_layout(settings.layout),
        **settings.engine,
    )
    moves = parse_rebalance(settings.rebalance, settings.stages) == "auto"
    rebalancing = Rebalancing() if moves else None
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        if rebalancing is not None:
            rebalancing.on_step(step)
        if picture is not None:
            steps.append(step)

    pipeline = Pipeline(
        profile,
        config,
        num_pages=settings.num_pages,
        max_model_len=settings.max_model_len,
        known_lengths=settings.known_lengths,
        longest_answer=settings.longest_answer,
        on_step=on_step,
    )
    if rebalancing is not None:
        rebalancing.attach(pipeline)
    layouts = [pipeline.layout]
    began = said = time.monotonic()

    def progress(ended: int, now: float) -> None:
        nonlocal said
        if time.monotonic() - said > 5.0:
            said = time.monotonic()
            _say(f"{load.name}: {ended} of {len(load.arrivals)} requests, {now:.0f} s simulated")

    arrivals = with_targets(
        load.arrivals, load.uncached, profile, pipeline.layout, budget, ttft, tpot
    )
    outcome = pipeline.run(arrivals, progress)
    took = time.monotonic() - began
    for at, move in rebalancing.moves if rebalancing is not None else ():
        layouts.append(move.layout)
        _say(f"{load.name}, {at:.1f} s: {move.sentence()}")
    if picture is not None:
        title = f"{profile.name}, simulated: {load.name}, {config.policy}"
        draw_timeline(picture, steps, layouts, title)
    return {
        "engine": "lectern, simulated",
        "profile": profile.name,
        "pp": settings.stages,
        "layout": pipeline.layout.counts,
        "trace": load.name,
        "load": load.load,
        "order": config.order,
        "policy": config.policy,
        "budget": budget,
        "seed": seed,
        **summarise(arrivals, outcome),
        **slo_figures(arrivals, outcome),
        "moves": 0 if rebalancing is None else len(rebalancing.moves),
        "dropped": load.dropped,
        "times_real_time": round(outcome.wall / max(took, 1e-9)),
    }


def _print(row: dict[str, Any], *, as_json: bool, first: bool) -> None:
    from serving.simulation.report import heading, line

    if as_json:
        print(json.dumps(row), flush=True)
        return
    if first:
        print(heading())
    print(line(row), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
