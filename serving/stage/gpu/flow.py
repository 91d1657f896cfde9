"""What a stage takes from its neighbours before a step and gives them after it, on its stream."""

from __future__ import annotations

from collections import deque
from types import ModuleType

from torch import Tensor

from serving.stage.gpu.results import StepTimes
from serving.stage.mirror import Rows
from serving.transport.base import StreamTransport

__all__ = ["Flow"]


class Flow:
    """The two ends of a stage among several; everything is launched, nothing is waited for.

    First stage: sampled tokens come back from the last and are entered into `last_tokens` by slot,
    in the order of their micro-batches. All others: hidden rows come from the stage before and are
    copied to where recorded steps read them.
    """

    def __init__(
        self,
        transport: StreamTransport,
        stage: int,
        stages: int,
        kernels: ModuleType,
        last_tokens: Tensor,
    ) -> None:
        self._transport = transport
        self._first, self._last = stage == 0, stage == stages - 1
        # Results of micro-batches this far behind have reached the driver.
        self._lag = stages + 1
        self._kernels, self._last_tokens = kernels, last_tokens
        self._expected: deque[tuple[int, int]] = deque()

    def enter(self, rows: Rows, hidden: Tensor | None, times: StepTimes) -> None:
        """Everything the micro-batch needs; `hidden` [at least T, H] takes the rows that come."""
        if self._first:
            self._take_tokens(rows, times)
            return
        if hidden is None:
            raise AssertionError("a stage after the first has a place for hidden rows")
        count = len(rows.positions)
        with times.waiting("wait_input"):
            found = self._transport.incoming(rows.number, count)
        hidden[:count].copy_(found)
        self._transport.taken(rows.number)

    def leave(self, rows: Rows, hidden: Tensor, times: StepTimes) -> None:
        """Stages before the last: the micro-batch's rows of `hidden`, padding left out, go on."""
        count = len(rows.positions)
        with times.waiting("wait_link"):
            place = self._transport.outgoing(rows.number, count)
        place.copy_(hidden[:count])
        self._transport.send(rows.number, count)

    def give_tokens(self, number: int, slots: Tensor, tokens: Tensor) -> None:
        """Last stage: ids [R] int32 were drawn for slots [R] int32."""
        entry, count = self._transport.outgoing_tokens(number), len(tokens)
        entry[0, :count].copy_(slots)
        entry[1, :count].copy_(tokens)
        self._transport.send_tokens(number)

    def _take_tokens(self, rows: Rows, times: StepTimes) -> None:
        # What decodes read, and what the links keep no longer even if nothing reads it yet.
        due = max(rows.reads_from, rows.number - self._lag)
        while self._expected and self._expected[0][0] <= due:
            number, count = self._expected.popleft()
            with times.waiting("wait_input"):
                entry = self._transport.incoming_tokens(number)
            self._kernels.keep_tokens(entry[0, :count], entry[1, :count], self._last_tokens)
        if len(rows.sampled_slots):
            self._expected.append((rows.number, len(rows.sampled_slots)))
            self._transport.expect_tokens(rows.number)
