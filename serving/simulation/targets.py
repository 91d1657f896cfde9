"""What each simulated request is asked to reach, and how a run did by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from serving.bench.attainment import summarise
from serving.config.service import Service, TtftTarget
from serving.core import Layout
from serving.driver.predictor import StepFeatures
from serving.simulation.pipeline import Arrival, Outcome
from serving.simulation.profile import Profile


def own_seconds(profile: Profile, layout: Layout, budget: int, tokens: int, before: int) -> float:
    """Seconds to the first token of a prompt alone: its `tokens` that are not cached go in chunks
    of `budget` through all stages, behind the `before` that are.
    """
    last = layout.num_stages - 1
    ended = [0.0] * layout.num_stages
    done = 0
    while done < tokens:
        chunk = min(budget, tokens - done)
        pairs = chunk * (before + done + (chunk + 1) / 2)
        done += chunk
        features = StepFeatures(chunk, pairs, 0, 0, int(done == tokens))
        there = 0.0
        for stage in range(layout.num_stages):
            seconds = profile.stage_seconds(features, len(layout.layers(stage)), last=stage == last)
            there = ended[stage] = max(there, ended[stage]) + seconds
            there += profile.link_s + profile.link_token_s * chunk
    return ended[-1] + 2 * profile.news_s + profile.plan_s


def with_targets(
    arrivals: Sequence[Arrival],
    uncached: Sequence[int],
    profile: Profile,
    layout: Layout,
    budget: int,
    ttft: TtftTarget | None,
    tpot: float | None,
) -> list[Arrival]:
    """The arrivals with their own times and targets, the same under every policy.

    `uncached` tokens of each prompt are those that a prefix cache that never forgets leaves.
    """
    made = []
    for one, tokens in zip(arrivals, uncached, strict=True):
        whole = len(one.prompt)
        own = own_seconds(profile, layout, budget, int(tokens), whole - int(tokens))
        target = None if ttft is None else TtftTarget(ttft.of(whole, own))
        made.append(replace(one, own=own, service=Service(ttft=target, tpot=tpot)))
    return made


def slo_figures(arrivals: Sequence[Arrival], outcome: Outcome) -> dict[str, Any]:
    """The figures of `serving.bench.attainment.summarise` for a simulated run."""
    tokens_out = np.array([one.tokens_out for one in arrivals])
    return summarise(
        arrival=[one.at for one in arrivals],
        ttft=outcome.first,
        tpot=(outcome.last - outcome.first) / np.maximum(1, tokens_out - 1),
        e2e=outcome.last,
        tokens_in=[len(one.prompt) for one in arrivals],
        tokens_out=tokens_out,
        own=[one.own for one in arrivals],
        ttft_target=[_seconds(one.service.ttft) for one in arrivals],
        tpot_target=[_or_nan(one.service.tpot) for one in arrivals],
    )


def _seconds(target: TtftTarget | None) -> float:
    return math.nan if target is None else target.seconds


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
