"""Layers made to move under a load: what is counted, and with an engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from serving.bench.moves import ForcedMoves
from serving.cli import register
from serving.errors import ConfigError, EngineDeadError
from serving.messages import LayersMoved
from tests.serving.tiny import make_checkpoint


def moved(seconds: float) -> LayersMoved:
    return LayersMoved(epoch=1, counts=[1, 1], before=[1, 1], seconds=seconds, slowest=None, why="")


async def test_gaps_beside_a_move_are_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    forced = ForcedMoves(1.0)
    now[0] = 10.0
    forced.moved(moved(0.5))
    for before, after in ((9.0, 9.4), (9.4, 9.45), (9.45, 9.75), (10.05, 10.07), (10.2, 10.3)):
        forced.gap(before, after)
    now[0] = 20.0
    forced.moved(moved(0.1))
    assert forced.figures() == {
        "moves": 2, "move_p50_ms": 300.0, "move_max_ms": 500.0, "gap_p50_ms": 100.0,
        "gap_moving_max_ms": 300.0, "gap_still_max_ms": 400.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "other"), [([2, 2], [3, 1]), ([3, 1], [2, 2]), ([1, 2, 3], [2, 1, 3])]
)
async def test_a_layer_goes_there_and_back(counts: list[int], other: list[int]) -> None:
    asked: list[list[int]] = []
    enough = asyncio.Event()

    def move_layers(to: list[int]) -> None:
        asked.append(list(to))
        if len(asked) == 4:
            enough.set()

    engine: Any = SimpleNamespace(
        layout=SimpleNamespace(counts=counts), move_layers=move_layers,
        stats=SimpleNamespace(layers=counts),
    )  # fmt: skip
    async with ForcedMoves(0.01).going(engine), asyncio.timeout(20):
        await enough.wait()
    assert asked[:4] == [other, counts, other, counts]
    assert asked[-1] == counts


async def test_stages_of_one_layer_have_none_to_give() -> None:
    engine: Any = SimpleNamespace(layout=SimpleNamespace(counts=[1, 1]))
    with pytest.raises(ConfigError, match="more than one layer"):
        async with ForcedMoves(0.01).going(engine):
            pass


async def test_what_stops_the_moves_is_told() -> None:
    def move_layers(to: list[int]) -> None:
        raise EngineDeadError("It broke.")

    engine: Any = SimpleNamespace(layout=SimpleNamespace(counts=[2, 2]), move_layers=move_layers)
    with pytest.raises(EngineDeadError, match="It broke"):
        async with ForcedMoves(0.01).going(engine):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("seconds", "stages", "rebalance", "elsewhere"),
    [(0.0, 2, "off", False), (float("nan"), 2, "off", False), (1.0, 1, "off", False),
     (1.0, 2, "auto", False), (1.0, 2, "off", True)],
)  # fmt: skip
def test_where_no_layer_can_be_moved(
    seconds: float, stages: int, rebalance: str, elsewhere: bool
) -> None:
    with pytest.raises(ConfigError, match="--move-every"):
        ForcedMoves.check(seconds, stages, rebalance, other=elsewhere)


def test_with_an_engine(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=4)
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(
        app,
        ["bench", "--model", str(folder), "--dtype", "float32", "--pipeline-parallel-size", "2",
         "--threads", "1", "--kv-memory", "64M", "--load", "fixed-20-150:8:0",
         "--move-every", "0.05", "--no-matmul", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["moves"] >= 2
    assert 0 < row["move_p50_ms"] <= row["move_max_ms"]
    assert row["gap_moving_max_ms"] > 0
    assert len(row["prediction_error_percent"]) == 2
    assert all(error is None or error >= 0 for error in row["prediction_error_percent"])
