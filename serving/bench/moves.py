"""Layers that are made to move while a load runs: how long each move takes, and who notices it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from statistics import median
from typing import TYPE_CHECKING, Any

from serving.errors import ConfigError
from serving.messages import LayersMoved

if TYPE_CHECKING:
    from serving.engine import Engine

#: What a switch delays comes this long after it at most, in seconds.
_AFTER = 0.1
#: The way home takes no longer than this, in seconds.
_HOME = 20.0


class ForcedMoves:
    """A layer goes from the middle stage to the one before it and back, every so many seconds.

    `moved` and `gap` are told of what happens, by the clock of the running loop.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._moves: list[tuple[float, float]] = []  # decided, switched
        self._gaps: list[tuple[float, float]] = []  # token before, token

    @staticmethod
    def check(seconds: float, stages: int, rebalance: str, *, other: bool) -> None:
        """Raise ConfigError where no layer can be moved like this; `other`: it is no --load in this
        process."""
        flag = "--move-every"
        if not 0.01 <= seconds <= 3600:
            raise ConfigError(f"{flag} must be 0.01 to 3600 seconds, not {seconds:g}.", flag)
        if other or stages < 2 or rebalance != "off":
            raise ConfigError(
                f"{flag} moves layers of an engine in this process under --load; give "
                "--pipeline-parallel-size 2 or more, and leave --url, --trace and "
                "--layer-rebalance.",
                flag,
            )

    def moved(self, move: LayersMoved) -> None:
        now = asyncio.get_running_loop().time()
        self._moves.append((now - move.seconds, now))

    def gap(self, before: float, now: float) -> None:
        self._gaps.append((before, now))

    @asynccontextmanager
    async def going(self, engine: Engine) -> AsyncIterator[None]:
        """Move as long as the block runs, then go home.

        Raises ConfigError where neither of the middle stages has a layer to give.
        """
        home, other = engine.layout.counts, list(engine.layout.counts)
        middle = len(home) // 2
        giver, taker = (middle, middle - 1) if home[middle] > 1 else (middle - 1, middle)
        other[giver] -= 1
        other[taker] += 1
        if not other[giver]:
            raise ConfigError(
                "--move-every needs a stage with more than one layer in the middle; give fewer "
                "stages.",
                "--move-every",
            )
        self._moves.clear()
        self._gaps.clear()
        task = asyncio.create_task(self._keep_moving(engine, home, other))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        engine.move_layers(home)
        for _ in range(int(_HOME / 0.02)):
            if engine.stats.layers == home:
                break
            await asyncio.sleep(0.02)

    async def _keep_moving(self, engine: Engine, home: list[int], other: list[int]) -> None:
        there = False
        while True:
            await asyncio.sleep(self._seconds)
            there = not there
            engine.move_layers(other if there else home)

    def figures(self) -> dict[str, Any]:
        """Milliseconds of moves, decision to switch, and between two tokens of an answer: the
        median of all, and the longest while layers moved and while none did."""
        lasted = [end - begin for begin, end in self._moves]
        still, moving = [0.0], [0.0]
        for before, now in self._gaps:
            beside = any(now > begin and before < end + _AFTER for begin, end in self._moves)
            (moving if beside else still).append(now - before)
        gaps = [now - before for before, now in self._gaps]
        return {
            "moves": len(lasted),
            "move_p50_ms": _ms(median(lasted or [0.0])),
            "move_max_ms": _ms(max(lasted, default=0.0)),
            "gap_p50_ms": _ms(median(gaps or [0.0])),
            "gap_moving_max_ms": _ms(max(moving)),
            "gap_still_max_ms": _ms(max(still)),
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
