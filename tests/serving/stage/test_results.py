"""The thread that hands results on: what it sends, and what it says when the device fails."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from serving.messages import StageSeconds
from serving.stage.gpu.results import PendingResult, ResultThread


class _Times:
    """A step that ended, or one that the device never came to the end of."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def synchronize(self) -> None:
        if self._error is not None:
            raise self._error

    def add_to(self, seconds: StageSeconds) -> None:
        seconds.busy += 0.25


def _pending(number: int, error: Exception | None = None) -> PendingResult:
    times: Any = _Times(error)
    return PendingResult(number, times, [torch.tensor([number], dtype=torch.int32)])


def test_results_keep_their_order_and_their_time() -> None:
    sent: list[PendingResult] = []
    thread = ResultThread(sent.append, pytest.fail)
    for number in range(5):
        thread.put(_pending(number))
    thread.close()
    assert [result.number for result in sent] == list(range(5))
    assert [result.message().tokens[0] for result in sent] == list(range(5))
    assert thread.seconds().busy == 1.25


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\nCUDA error: gone\nmore"), "RuntimeError: CUDA error: gone"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_a_failure_is_told_and_ends_the_process(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    ended = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    told: list[str] = []
    thread = ResultThread(lambda result: None, told.append)
    thread.put(_pending(0, error))
    assert ended.wait(20)
    thread.close()
    assert told == [said]
    assert codes == [1]
