"""An event loop whose clock jumps to the next timer, and a target that serves on it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from serving.bench.targets import BenchError, Target, Times
from serving.config.service import Service
from serving.errors import OverloadedError

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Never waits: what would have been waited for passes on the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise RuntimeError("nothing is left that could happen")
            self.now += max(0.0, timeout)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


class OneByOne(Target):
    """Prefills one prompt after the other as they came, `token_s` each token; answers flow freely.

    Refuses who would be more than the `most`-th to wait; fails whose prompt has `broken` tokens.
    """

    def __init__(
        self,
        token_s: float = 0.001,
        gap_s: float = 0.01,
        most: int | None = None,
        broken: int = -1,
        context: int | None = None,
    ) -> None:
        self.token_s, self.gap_s, self.most, self.broken = token_s, gap_s, most, broken
        self.context = context
        self.asked: list[tuple[float, list[int], int, Service | None, str]] = []
        self.waiting = 0
        self.closed = False
        self._free = asyncio.Lock()

    async def ask(
        self, prompt: list[int], tokens_out: int, service: Service | None = None, salt: str = ""
    ) -> Times:
        now = asyncio.get_running_loop().time
        self.asked.append((now(), prompt, tokens_out, service, salt))
        if len(prompt) == self.broken:
            raise BenchError("A request gave 1 tokens instead of 2.")
        if self.most is not None and self.waiting >= self.most:
            raise OverloadedError("Too many wait.", 1.0)
        self.waiting += 1
        async with self._free:
            await asyncio.sleep(len(prompt) * self.token_s)
        self.waiting -= 1
        first = now()
        await asyncio.sleep((tokens_out - 1) * self.gap_s)
        return Times(first, now(), self.gap_s if tokens_out > 1 else 0.0)

    async def close(self) -> None:
        self.closed = True
