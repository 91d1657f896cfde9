"""Results leave one step late: a thread waits for the device, the launch path never does."""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from serving.messages import StageSeconds, StepResult, StepTime

__all__ = ["PendingResult", "ResultThread", "StepTimes", "to_host"]

Wait = Literal["wait_input", "wait_link"]
_CLOSE_SECONDS = 1.0
#: How much faster than this host's clock the device's may seem, as a share: far more than it is.
_CREEP = 1e-4


class StepTimes:
    """When the device came to the beginning of a step, to each wait in it, and to its end."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._waits: list[tuple[Wait, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = self._mark()
        self._ended: torch.cuda.Event | None = None

    @contextmanager
    def waiting(self, kind: Wait) -> Iterator[None]:
        """What is launched inside makes the stream wait."""
        before = self._mark()
        yield
        self._waits.append((kind, before, self._mark()))

    def end(self) -> None:
        self._ended = self._mark()

    def synchronize(self) -> None:
        """Wait for the end of the step."""
        if self._ended is None:
            raise AssertionError("a step ends before anybody waits for it")
        self._ended.synchronize()

    def seconds(self) -> StageSeconds:
        """Of a step that ended: busy is what is not spent in waits, and nothing is idle."""
        found = StageSeconds(busy=_seconds(self._started, self._ended))
        for kind, before, after in self._waits:
            spent = _seconds(before, after)
            found.busy -= spent
            setattr(found, kind, getattr(found, kind) + spent)
        return found

    def since_input(self) -> float:
        """Seconds from the moment the step had all of its input to its end."""
        inputs = [after for kind, _, after in self._waits if kind == "wait_input"]
        return _seconds(inputs[-1] if inputs else self._started, self._ended)

    def since(self, earlier: StepTimes) -> float:
        """Seconds from the end of an earlier step to the end of this one."""
        return _seconds(earlier._ended, self._ended)

    def _mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


def _seconds(begin: torch.cuda.Event | None, end: torch.cuda.Event | None) -> float:
    if begin is None or end is None:
        raise AssertionError("a step ends before its time is asked for")
    return float(begin.elapsed_time(end)) / 1000


@dataclass
class PendingResult:
    """A launched micro-batch: `arrays` are pinned copies that are whole once it ended."""

    number: int
    times: StepTimes
    arrays: list[Tensor] = field(default_factory=list)
    """Tokens; where a row asked for them, log probabilities, most likely ids, and theirs."""

    def message(self) -> StepResult:
        """What the driver is told."""
        data = [array.numpy().tobytes() for array in self.arrays]
        if len(data) <= 1:
            return StepResult(number=self.number, tokens=data[0] if data else b"")
        tokens, logprobs, top_ids, top_logprobs = data
        return StepResult(
            number=self.number,
            tokens=tokens,
            logprobs=logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            top_k=self.arrays[2].shape[1],
        )


def to_host(tensor: Tensor) -> Tensor:
    """A pinned copy, whole once the stream has come past it."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    return pinned


class ResultThread:
    """Sends results in the order of their launches, and keeps the device's time.

    `send` is called on this thread only. A failure of the device shows here first: it is given to
    `failed`, and the process ends, as its launches can have no result any more.
    """

    def __init__(
        self, send: Callable[[PendingResult], None], failed: Callable[[str], None]
    ) -> None:
        self._send, self._failed = send, failed
        self._queue: queue.SimpleQueue[PendingResult | None] = queue.SimpleQueue()
        self._seconds = StageSeconds()
        self._started = time.perf_counter()
        self._last: tuple[StepTimes, float] | None = None
        self._steps: deque[StepTime] = deque(maxlen=4096)
        self._put = self._noted = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="results")
        self._thread.start()

    def put(self, result: PendingResult) -> None:
        self._put += 1
        self._queue.put(result)

    @property
    def behind(self) -> bool:
        """Whether there are steps whose times are not known yet."""
        return self._noted < self._put

    def seconds(self) -> StageSeconds:
        """From the device's own clock: from the moment it came to a step to the step's end."""
        found = self._seconds
        spent = found.busy + found.wait_input + found.wait_link
        idle = time.perf_counter() - self._started - spent
        return StageSeconds(
            busy=found.busy,
            wait_input=found.wait_input,
            wait_link=found.wait_link,
            idle=max(0.0, idle),
        )

    def take_steps(self) -> list[StepTime]:
        """Steps that ended since the last call, by this host's clock; where nobody calls, the
        oldest are dropped."""
        return [self._steps.popleft() for _ in range(len(self._steps))]

    def restart_clock(self) -> None:
        self._seconds, self._started = StageSeconds(), time.perf_counter()

    def close(self) -> None:
        """Send what is finished, and end. A step may wait for a dead neighbour for ever: then the
        thread is left behind."""
        self._queue.put(None)
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _note(self, number: int, times: StepTimes, now: float) -> None:
        """Keep the times of a step whose end was seen just now.

        This thread may see it late, so its end on this host's clock is told from that of the step
        before and the device's clock. That may only creep away into the future, and what was seen
        has happened: it is put right whenever the thread is quick.
        """
        ended = now
        if self._last is not None:
            before, at = self._last
            ended = min(now, at + times.since(before) * (1 + _CREEP))
        self._last = times, ended
        spent, total = times.seconds(), self._seconds
        total.busy += spent.busy
        total.wait_input += spent.wait_input
        total.wait_link += spent.wait_link
        began, ended = ended - times.since_input(), ended - spent.wait_link
        self._steps.append(StepTime(number, spent.busy, began, ended))
        self._noted += 1

    def _run(self) -> None:
        try:
            while (result := self._queue.get()) is not None:
                result.times.synchronize()
                now = time.monotonic()
                self._send(result)
                self._note(result.number, result.times, now)
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]  # may be empty
            self._failed(f"{type(error).__name__}: {first}")
            os._exit(1)
