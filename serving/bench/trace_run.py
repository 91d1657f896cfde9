"""`lectern bench --trace`: one row for each order and rate, and the goodput of each order."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.bench.replay import (
    Points,
    Wishes,
    find_goodput,
    make_jobs,
    own_seconds,
    replay,
    time_prefills,
)
from serving.bench.settings import (
    Settings,
    TraceSettings,
    circumstances,
    kv_memory,
    print_row,
    say,
)
from serving.bench.targets import InProcess, Remote, Target
from serving.cli import resolve_model
from serving.config.engine import EngineConfig
from serving.config.model import ModelConfig
from serving.config.service import parse_tpot, parse_ttft
from serving.errors import ConfigError, ModelError
from serving.traces import Trace, read_trace
from serving.traces.prompts import uncached_tokens
from serving.traces.recorded import Mix

if TYPE_CHECKING:
    from serving.tokenizer import Tokenizer

#: What runs before anything is measured: so many requests, tokens in and out of each at most.
WARM_UP = (16, 128, 16)
#: Without --rate the first one tried is this share of what prefills alone would allow.
FIRST_RATE = 0.7


@dataclass(frozen=True)
class _Run:
    """All that stays the same from order to order."""

    settings: Settings
    wanted: TraceSettings
    model: ModelConfig
    name: str
    wishes: Wishes


async def run_trace(settings: Settings, wanted: TraceSettings) -> None:
    """Print the rows. Raises ConfigError, ModelError, and what a request raises."""
    wishes = Wishes(parse_ttft(wanted.slo_ttft), parse_tpot(wanted.slo_tpot))
    folder, name = resolve_model(settings.model)
    model = ModelConfig.from_folder(folder)
    if model.vocab_size <= 200:
        raise ModelError(f"{name} has {model.vocab_size} tokens; a trace needs more than 200.")
    trace = _recorded(wanted, settings.seed, folder)
    run = _Run(settings, wanted, model, name, wishes)
    if settings.url:
        target: Target = await Remote.connect(settings.url, settings.key)
        await _run_order(run, target, trace, None, [])
        return
    context = settings.engine["max_model_len"] or min(
        model.context_length, max(one.tokens_in + one.tokens_out for one in trace.requests)
    )
    lengths = [(one.tokens_in, one.tokens_out) for one in _fitting(trace, context).requests]
    configs = [
        EngineConfig(
            model=folder,
            served_model_name=name,
            enable_prefix_caching=trace.shares,
            kv_memory=kv_memory(settings, [lengths], model),
            **{**settings.engine, "max_model_len": context, "order": order},
        )
        for order in wanted.orders or ["fcfs"]
    ]
    points: Points = []
    for config in configs:
        began = time.monotonic()
        target = await InProcess.start(config, say)
        say(f"{config.order}: the engine is ready after {time.monotonic() - began:.1f} s.")
        points = await _run_order(run, target, trace, config.order, points)


def _recorded(wanted: TraceSettings, seed: int, folder: Path) -> Trace:
    trace = read_trace(Path(wanted.trace), seed, most=wanted.requests or None)
    if any(one.text for one in trace.requests):
        tokenizer = _tokenizer(folder)
        trace = trace.tokenised(lambda text: tokenizer.encode(text, add_special_tokens=False))
    if wanted.mix:
        trace = Mix.parse(wanted.mix).into(trace, seed)
    if wanted.time_scale:
        trace = trace.stretched(wanted.time_scale)
    if wanted.rate or wanted.goodput:
        trace.at_rate(1.0)  # refused before an engine is started for it
    return trace


def _tokenizer(folder: Path) -> Tokenizer:
    from serving.tokenizer import Tokenizer

    found = Tokenizer.from_folder(folder)
    if found is None:
        raise ConfigError(
            f"{folder} has no tokenizer, which the text of this trace needs; give --model a "
            "checkpoint that has one.",
            "--model",
        )
    return found


def _fitting(trace: Trace, context: int) -> Trace:
    kept = trace.fitting(context)
    if not kept.requests:
        raise ConfigError(
            f"No request of {trace.name} fits into a context of {context} tokens; raise "
            "--max-model-len as far as the model goes.",
            "--max-model-len",
        )
    return kept


async def _run_order(
    run: _Run, target: Target, recorded: Trace, order: str | None, points: Points
) -> Points:
    """Warm up, time lone prefills unless that was done, and run every rate; closes the target."""
    wanted, settings, vocab = run.wanted, run.settings, run.model.vocab_size
    salt = secrets.token_hex(8)  # so that nothing is found that an earlier run left in the cache
    page_size: int = 16 if settings.url else settings.engine["page_size"]
    label = f"{recorded.name} {order}" if order else recorded.name
    try:
        context = target.context or settings.engine["max_model_len"] or run.model.context_length
        trace = _fitting(recorded, context)
        dropped = recorded.skipped + len(recorded.requests) - len(trace.requests)
        if dropped:
            say(f"{label}: {dropped} requests are longer than {context} tokens or have no text.")
        await _warm_up(run, target, trace, salt)
        if not points:
            uncached = uncached_tokens(trace.requests, page_size)
            points = await time_prefills(target, int(uncached.max()), vocab, salt)
            times = ", ".join(f"{tokens}: {seconds:.3f} s" for tokens, seconds in points)
            say(f"{label}: lone prefills by tokens: {times}.")

        async def one_rate(rate: float) -> dict[str, Any]:
            part = _part(trace, rate, wanted)
            jobs = make_jobs(part, points, run.wishes, vocab, page_size, settings.seed)
            name = f"{label} {part.rate:.3g}/s"
            began = time.monotonic()
            found = await replay(target, jobs, salt=f"{salt}-{rate}", name=name, say=say)
            row = {
                **_head(run, recorded.name, order),
                "rate": round(part.rate, 4),
                "seed": settings.seed,
                "slo_ttft": wanted.slo_ttft,
                "slo_tpot": wanted.slo_tpot,
                **found,
                "dropped": dropped,
                **circumstances(settings),
            }
            print_row(row, settings.as_json)
            if settings.picture is not None:
                await target.draw(settings.picture, began, f"{run.name}, measured: {name}")
            return found

        if not wanted.goodput:
            await one_rate(wanted.rate)
            return points
        own = own_seconds(points, uncached_tokens(trace.requests, page_size))
        first = wanted.rate or float(FIRST_RATE / np.mean(own))
        goodput = await find_goodput(one_rate, first, wanted.rates)
        print_row(
            {
                **_head(run, recorded.name, order),
                "seed": settings.seed,
                "goodput_rate_req_s": round(goodput.good, 4),
                "next_bad_rate_req_s": None if goodput.bad == math.inf else round(goodput.bad, 4),
                **circumstances(settings),
            },
            settings.as_json,
        )
        if not goodput.good:
            say(f"{label}: no rate was good enough; give a lower --rate to start with.")
        elif goodput.bad == math.inf:
            say(f"{label}: every rate was good enough; give a higher --rate to start with.")
        return points
    finally:
        await target.close()


def _part(trace: Trace, rate: float, wanted: TraceSettings) -> Trace:
    """What is replayed at a rate, 0 being the trace's own: with --goodput so many seconds of it."""
    if not rate:
        return trace
    if not wanted.goodput:
        return trace.at_rate(rate)
    count = max(2, round(rate * wanted.seconds))
    if count > len(trace.requests):
        say(
            f"{trace.name}: {len(trace.requests)} requests last only "
            f"{len(trace.requests) / rate:.0f} s at {rate:.3g} a second."
        )
    return trace.first(count).at_rate(rate)


async def _warm_up(run: _Run, target: Target, trace: Trace, salt: str) -> None:
    """The first requests, all at once and cut to what a slow machine has soon done."""
    count, tokens_in, tokens_out = WARM_UP
    short = [
        replace(
            one,
            at=0.0,
            tokens_in=min(tokens_in, one.tokens_in),
            tokens_out=min(tokens_out, one.tokens_out),
            blocks=(),
            prompt=None,
        )
        for one in trace.requests[:count]
    ]
    part = replace(trace, requests=short)
    jobs = make_jobs(part, [(1, 0.0)], Wishes(None, None), run.model.vocab_size, 16, 0)
    await replay(target, jobs, salt=f"{salt}-warm-up")


def _head(run: _Run, trace: str, order: str | None) -> dict[str, Any]:
    """`order` is None for an address, whose server has its own."""
    return {
        "engine": "lectern",
        "pp": run.settings.engine["pipeline_parallel_size"],
        "tp": run.settings.engine["tensor_parallel_size"],
        "model": run.name,
        "trace": trace,
        "mix": run.wanted.mix or None,
        "order": order,
    }
