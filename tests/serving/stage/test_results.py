"""The thread that hands results on: what it sends, and what it says when the device fails."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.messages import StageSeconds
from serving.stage.gpu import results
from serving.stage.gpu.results import PendingResult, ResultThread


class _Times:
    """A step that ended, or one that the device never came to the end of. It ends so many seconds
    after the one before by the device's clock.
    """

    def __init__(self, error: Exception | None = None, since: float = 0.0) -> None:
        self._error, self._since = error, since

    def synchronize(self) -> None:
        if self._error is not None:
            raise self._error

    def seconds(self) -> StageSeconds:
        return StageSeconds(busy=0.25, wait_input=0.5, wait_link=0.125)

    def since_input(self) -> float:
        return 0.25

    def since(self, earlier: object) -> float:
        assert isinstance(earlier, _Times)
        return self._since


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
    assert thread.seconds().wait_input == 2.5
    steps = thread.take_steps()
    assert [(step.number, step.busy) for step in steps] == [(n, 0.25) for n in range(5)]
    assert not thread.take_steps()


def test_steps_are_told_by_the_clock_of_the_host() -> None:
    """The device ends one every 20 ms. What is seen late is put where it belongs, also what came
    before anything was seen in time; the device's clock runs slow by 50 millionths."""
    late = [0.003, 0.005, 0.0, 0.004, 0.001, *[0.002] * 2000, 0.0, 0.005]
    thread = ResultThread(lambda result: None, pytest.fail)
    thread.close()
    for number, by in enumerate(late):
        times: Any = _Times(since=0.02 * (1 - 5e-5))
        thread._note(number, times, 100 + 0.02 * number + by)
    steps = thread.take_steps()
    ends = [step.ended + 0.125 - (100 + 0.02 * step.number) for step in steps]
    assert ends[0] == pytest.approx(0.003)  # there is nothing yet to tell it from
    assert ends[1] == pytest.approx(0.003, abs=1e-5)
    assert ends[2:5] == pytest.approx([0.0] * 3, abs=1e-5)
    # Nobody looked in time for 40 s.
    assert ends[2004] == pytest.approx(0.002, abs=1e-5)
    assert ends[2005:] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert all(step.ended - step.began == pytest.approx(0.125) for step in steps)


def test_a_step_that_runs_is_known_of() -> None:
    reached, go = threading.Event(), threading.Event()

    def send(result: PendingResult) -> None:
        reached.set()
        assert go.wait(20)

    thread = ResultThread(send, pytest.fail)
    assert not thread.behind
    thread.put(_pending(0))
    assert reached.wait(20)
    assert thread.behind
    assert not thread.take_steps()
    go.set()
    thread.close()
    assert not thread.behind
    assert len(thread.take_steps()) == 1


def test_steps_that_nobody_takes_need_no_room() -> None:
    thread = ResultThread(lambda result: None, pytest.fail)
    for number in range(5000):
        thread.put(_pending(number))
    thread.close()
    assert [step.number for step in thread.take_steps()] == list(range(904, 5000))


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

    # The module's own name for it: no other thread of this process may be kept alive.
    monkeypatch.setattr(results, "os", SimpleNamespace(_exit=leave))
    told: list[str] = []
    thread = ResultThread(lambda result: None, told.append)
    thread.put(_pending(0, error))
    assert ended.wait(20)
    thread.close()
    assert told == [said]
    assert codes == [1]
