"""Results leave one step late: a thread waits for the device, the launch path never does."""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.messages import StageSeconds

__all__ = ["PendingResult", "ResultThread"]


@dataclass
class PendingResult:
    """A launched micro-batch: `arrays` are pinned copies that are whole once `done` has passed."""

    number: int
    done: torch.cuda.Event
    launched: float
    arrays: list[Tensor] = field(default_factory=list)


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
        self._busy = 0.0
        self._finished = self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True, name="results")
        self._thread.start()

    def put(self, result: PendingResult) -> None:
        self._queue.put(result)

    def seconds(self) -> StageSeconds:
        """busy: from the launch of a step, or the end of the one before it, to its end."""
        total = time.perf_counter() - self._started
        return StageSeconds(busy=self._busy, idle=max(0.0, total - self._busy))

    def restart_clock(self) -> None:
        self._busy, self._started = 0.0, time.perf_counter()

    def close(self) -> None:
        """Send what is finished, and end."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while (result := self._queue.get()) is not None:
                result.done.synchronize()
                now = time.perf_counter()
                self._busy += now - max(result.launched, self._finished)
                self._finished = now
                self._send(result)
        except Exception as error:
            traceback.print_exc()
            self._failed(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            os._exit(1)
