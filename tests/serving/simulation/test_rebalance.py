"""The balancer in the simulator: it finds the better layout, follows a disturbance, and rests."""

from __future__ import annotations

import numpy as np
import pytest

from serving.simulation.pipeline import Arrival, Outcome, Pipeline, Slowdown, simulated_config
from serving.simulation.profile import Profile
from serving.simulation.rebalance import Rebalancing


def chat(count: int, rate: float, tokens_out: int = 60) -> list[Arrival]:
    source = np.random.default_rng(4)
    return [
        Arrival(n / rate, np.zeros(int(source.integers(10, 150)), dtype=np.int32), tokens_out)
        for n in range(count)
    ]


def run(
    arrivals: list[Arrival],
    *,
    rebalance: bool,
    slowdown: Slowdown | None = None,
    noise: float = 0.05,
    layout: list[int] | None = None,
) -> tuple[Outcome, Rebalancing]:
    rebalancing = Rebalancing(noise=noise, seed=1)
    pipeline = Pipeline(
        Profile.load("qwen3-8b-h200"),
        simulated_config(
            4,
            max_num_seqs=256,
            enable_prefix_caching=False,
            max_num_batched_tokens=1024,
            layer_layout=layout,
        ),
        num_pages=20_000,
        max_model_len=4096,
        slowdown=slowdown,
        on_step=rebalancing.on_step if rebalance else None,
    )
    rebalancing.attach(pipeline)
    return pipeline.run(arrivals), rebalancing


def test_a_stationary_load_is_balanced_once_and_then_left_alone() -> None:
    arrivals = chat(420, 60)
    even, _ = run(arrivals, rebalance=False)
    moved, rebalancing = run(arrivals, rebalance=True)
    assert 1 <= len(rebalancing.moves) <= 2
    assert rebalancing.moves[-1][0] < 6
    last = rebalancing.moves[-1][1].layout
    assert len(last.layers(3)) < 9  # the head lies there
    assert moved.last.mean() < 0.96 * even.last.mean()


def test_a_stage_slowed_from_outside_gives_layers_away_within_seconds() -> None:
    def slowed(stage: int, at: float, seconds: float) -> float:
        return seconds * 1.3 if stage == 1 and at > 2 else seconds

    arrivals = chat(540, 60)
    late = np.array([one.at > 5 for one in arrivals])
    layout = [10, 10, 9, 7]
    calm, _ = run(arrivals, rebalance=False, layout=layout)
    hurt, _ = run(arrivals, rebalance=False, layout=layout, slowdown=slowed)
    helped, rebalancing = run(arrivals, rebalance=True, layout=layout, slowdown=slowed)
    lost = hurt.last[late].mean() - calm.last[late].mean()
    won = hurt.last[late].mean() - helped.last[late].mean()
    # Of P stages the others can take (P - 1) / P of the loss; 60 % of that is asked for.
    assert won > 0.6 * 0.75 * lost
    assert 2 < rebalancing.moves[0][0] < 5
    assert len(rebalancing.moves[-1][1].layout.layers(1)) < 10


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_balanced_pipeline_is_left_as_it_is(noise: float) -> None:
    arrivals = chat(300, 60)
    _, rebalancing = run(arrivals, rebalance=True, layout=[10, 9, 9, 8], noise=noise)
    assert len(rebalancing.moves) <= 1
