"""Links between GPUs by NCCL, where a neighbour's memory cannot be mapped.

Every edge, and the way of sampled tokens, is a communicator of two ranks with a stream of its own.
A transfer holds an SM or two on both sides while it waits for the other side. Two buffers an edge:
one is written again only behind the work that last read it. NCCL reads its settings, such as
NCCL_NVLS_ENABLE, from the environment; none is changed here.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.base import StreamTransport

__all__ = ["NcclTransport"]

# The type stubs of torch know only a part of what is used here.
dist: Any = torch.distributed

_BUFFERS = 2
_CHECKED_ROWS = 16
_CHECK_SECONDS = 60.0
_CLOSE_SECONDS = 1.0


class _Edge:
    """One direction between two stages: a communicator, its stream, buffers and their events."""

    def __init__(self, store: Any, name: str, rank: int, buffers: list[Tensor]) -> None:
        options = dist.ProcessGroupNCCL.Options()
        # A stage that is idle has posted nothing, and the driver watches over the time of a step.
        options._timeout = timedelta(days=1)
        self._links = dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, 2, options)
        self._rank = rank
        device = buffers[0].device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = buffers
        # Of each buffer: when the transfer is through, and when the stream that computes is.
        self._moved = [_event() for _ in buffers]
        self._used = [_event() for _ in buffers]

    def buffer(self, turn: int, rows: int) -> Tensor:
        return self._buffers[turn % len(self._buffers)][:rows]

    def await_moved(self, turn: int, compute: torch.cuda.Stream) -> None:
        """`compute` waits until the transfer through this buffer is over."""
        compute.wait_event(self._moved[turn % len(self._buffers)])

    def used(self, turn: int, compute: torch.cuda.Stream) -> None:
        """What `compute` has been given so far is all that it does with this buffer."""
        self._used[turn % len(self._buffers)].record(compute)

    def move(self, turn: int, rows: int) -> None:
        """Send or receive `rows` of a buffer behind the work that last used it."""
        at = turn % len(self._buffers)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._used[at])
            part = [self._buffers[at][:rows]]
            other = 1 - self._rank
            work = (self._links.send if self._rank == 0 else self._links.recv)(part, other, 0)
            # Makes the stream wait, not the host.
            work.wait()
            self._moved[at].record(self.stream)


class NcclTransport(StreamTransport):
    """The links of one stage; the communicators are made in the order of the stages."""

    name = "NCCL"

    def __init__(
        self,
        stage: int,
        stages: int,
        stream: torch.cuda.Stream,
        store: Any,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        max_rows: int,
    ) -> None:
        self._stage, self._last, self._compute = stage, stages - 1, stream
        # Kernels are compiled once for aligned addresses and once more for others.
        self._most_rows = -(-max_rows // 4) * 4
        self._width, self._dtype = hidden_size, dtype
        device = stream.device

        def rows(count: int) -> list[Tensor]:
            shape = (max_tokens, hidden_size)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]

        def entries(count: int) -> list[Tensor]:
            shape = (2, self._most_rows)
            return [torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(count)]

        self._edges: list[_Edge] = []
        if stage > 0:
            self._before = self._edge(store, f"nccl-{stage - 1}", 1, rows(_BUFFERS))
        if stage < self._last:
            self._after = self._edge(store, f"nccl-{stage}", 0, rows(_BUFFERS))
        # As many entries as micro-batches can be in flight, so that no drawing waits for the
        # first stage to fetch an earlier one's.
        if stage == self._last:
            self._tokens = self._edge(store, "nccl-tokens", 0, entries(stages + 1))
        if stage == 0:
            self._tokens = self._edge(store, "nccl-tokens", 1, entries(stages + 1))
        torch.cuda.synchronize(device)

    def _edge(self, store: Any, name: str, rank: int, buffers: list[Tensor]) -> _Edge:
        edge = _Edge(store, name, rank, buffers)
        self._edges.append(edge)
        return edge

    @property
    def device_bytes(self) -> int:
        return sum(buffer.nbytes for edge in self._edges for buffer in edge._buffers)

    def outgoing(self, number: int, rows: int) -> Tensor:
        self._after.await_moved(number, self._compute)
        return self._after.buffer(number, rows)

    def send(self, number: int, rows: int) -> None:
        self._after.used(number, self._compute)
        self._after.move(number, rows)

    def incoming(self, number: int, rows: int) -> Tensor:
        self._before.move(number, rows)
        self._before.await_moved(number, self._compute)
        return self._before.buffer(number, rows)

    def taken(self, number: int) -> None:
        self._before.used(number, self._compute)

    def outgoing_tokens(self, number: int) -> Tensor:
        self._tokens.await_moved(number, self._compute)
        return self._tokens.buffer(number, 2)

    def send_tokens(self, number: int) -> None:
        self._tokens.used(number, self._compute)
        self._tokens.move(number, 2)

    def expect_tokens(self, number: int) -> None:
        """Fetched when they are needed: a transfer that waits would hold an SM until then."""

    def incoming_tokens(self, number: int) -> Tensor:
        # The entry before it is read on the stream that computes, launched before this call.
        self._tokens.used(number, self._compute)
        self._tokens.move(number, 2)
        self._tokens.await_moved(number, self._compute)
        return self._tokens.buffer(number, 2)

    def warm_up(self) -> None:
        rows = min(_CHECKED_ROWS, self._rows_held())
        expected = torch.arange(rows * self._width).remainder(127).view(rows, -1).to(self._dtype)
        if self._stage > 0:
            self._compare(self.incoming(0, rows), expected, self._stage - 1, self._stage)
            self.taken(0)
        if self._stage < self._last:
            self.outgoing(0, rows).copy_(expected)
            self.send(0, rows)
        drawn = torch.arange(2 * self._most_rows, dtype=torch.int32).view(2, -1)
        if self._stage == self._last:
            self.outgoing_tokens(0).copy_(drawn)
            self.send_tokens(0)
        if self._stage == 0:
            self._compare(self.incoming_tokens(0), drawn, self._last, 0)

    def _rows_held(self) -> int:
        edge = self._before if self._stage > 0 else self._after
        return len(edge.buffer(0, 1 << 30))

    def _compare(self, found: Tensor, expected: Tensor, source: int, target: int) -> None:
        # The host would wait for ever for what never comes.
        if not _finished_within([self._compute], _CHECK_SECONDS):
            raise EngineDeadError(
                f"The link from stage {source} to stage {target} by {self.name} carried nothing "
                f"within {_CHECK_SECONDS:.0f} s; set NCCL_DEBUG=WARN to see what it says."
            )
        if not torch.equal(found.cpu(), expected):
            raise EngineDeadError(
                f"The link from stage {source} to stage {target} by {self.name} carried wrong "
                "values."
            )

    def close(self) -> None:
        _finished_within([edge.stream for edge in self._edges], _CLOSE_SECONDS)


def _finished_within(streams: list[torch.cuda.Stream], seconds: float) -> bool:
    """Whether all that was launched on these streams ended in time. A transfer may wait for ever,
    so another thread waits for it, left behind if need be."""
    done = threading.Event()

    def wait() -> None:
        try:
            for stream in streams:
                stream.synchronize()
        finally:  # a failure of the device shows again where its results are used
            done.set()

    threading.Thread(target=wait, daemon=True, name="streams").start()
    return done.wait(seconds)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
