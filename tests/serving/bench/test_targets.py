"""What a target in process passes on and measures, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from serving.bench.targets import BenchError, InProcess, Times
from serving.config.service import Service, TtftTarget
from serving.core import Layout, SamplingParams, TokenOutput
from serving.errors import OverloadedError
from tests.serving.bench.virtual_time import run_virtually


class Scripted:
    """An engine that gives tokens after pauses, or refuses."""

    max_model_len = 77
    layout = Layout.even(2, 1)

    def __init__(self, script: list[tuple[float, int]], refuses: bool = False) -> None:
        self.script, self.refuses = script, refuses
        self.asked: list[tuple[Any, ...]] = []

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        service: Service | None = None,
    ) -> AsyncIterator[TokenOutput]:
        self.asked.append((prompt, params.max_tokens, params.ignore_eos, cache_salt, service))
        yield TokenOutput(token_ids=[], queued=True)
        if self.refuses:
            raise OverloadedError("Too many wait.", 2.0)
        for pause, count in self.script:
            await asyncio.sleep(pause)
            yield TokenOutput(token_ids=[5] * count)


def ask(engine: Scripted, tokens_out: int, **given: Any) -> Times:
    target = InProcess(cast(Any, engine))
    assert target.context == 77
    return run_virtually(target.ask([1, 2], tokens_out, **given))


def test_first_last_and_longest_gap() -> None:
    engine = Scripted([(2.0, 0), (1.0, 1), (0.5, 2), (4.0, 1), (1.0, 1)])
    service = Service(ttft=TtftTarget(1.0), tpot=0.1)
    times = ask(engine, 5, service=service, salt="s")
    assert times == Times(pytest.approx(3.0), pytest.approx(8.5), pytest.approx(4.0))
    assert engine.asked == [([1, 2], 5, True, "s", service)]
    assert ask(Scripted([(1.0, 1)]), 1).longest_gap == 0.0


def test_a_wrong_number_of_tokens_is_an_error() -> None:
    with pytest.raises(BenchError, match="gave 3 tokens instead of 4"):
        ask(Scripted([(1.0, 3)]), 4)


def test_a_refusal_is_passed_on() -> None:
    with pytest.raises(OverloadedError):
        ask(Scripted([], refuses=True), 4)
