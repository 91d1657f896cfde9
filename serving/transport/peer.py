"""Links between GPUs of one host: copies into the neighbour's memory, ordered by streams alone.

Every stage allocates one block, which its neighbours map (CUDA IPC):

    | arrived | credit | tokens | ring of sampled tokens (first stage) | activations (all others) |

Who writes what, always by a stream of the writer's own:

    stage s-1  a micro-batch's rows, then its number into `arrived`         of stage s
    stage s    the number of the micro-batch whose rows it has taken into `credit`  of stage s-1
    last       slots and ids drawn, then the number into `tokens`           of stage 0

A reader's stream waits until the word in its own memory has reached the number that its plan says
(`cuStreamWaitValue32`), so nothing but the plan says what comes. Rows are moved by a copy engine.

Sampled tokens need no credit. Entry n of the ring is written again for micro-batch n + R, which the
last stage draws only after the first stage computed it, and that, by the contract of
`incoming_tokens`, is launched behind the reading of entry n. The same holds for the last stage's
own copy of the ring.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.base import StreamTransport
from serving.transport.cuda import LinkRefusedError, StreamDriver

__all__ = ["Exchange", "PeerTransport"]

# Words that different devices write lie in lines of their own.
_ARRIVED, _CREDIT, _TOKENS, _RING = 0, 256, 512, 4096
_OUTGOING = 2  # a buffer is filled again only when its last send has read it
_CHECKED_ROWS = 16
_CHECK_SECONDS = 60.0
_CLOSE_SECONDS = 1.0
_WORD = 1 << 32


class Exchange(Protocol):
    """How stages tell each other a few words at start."""

    def publish(self, key: str, text: str) -> None: ...

    def lookup(self, key: str) -> str:
        """What was, or will be, published under the key; waits for it."""


class PeerTransport(StreamTransport):
    """The links of one stage; `connect` once every stage has one.

    Raises LinkRefusedError where this machine has no memory to share. `compute` is the stream on
    which the stage computes; `max_rows` is the most tokens drawn in one micro-batch.
    """

    name = "peer copies (CUDA IPC)"

    def __init__(
        self,
        stage: int,
        stages: int,
        driver: StreamDriver,
        compute: int,
        exchange: Exchange,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        max_rows: int,
    ) -> None:
        self._stage, self._last = stage, stages - 1
        self._driver, self._compute, self._exchange = driver, compute, exchange
        self._width, self._dtype = hidden_size, dtype
        # One buffer for every micro-batch that can be in flight, so that no send has to wait for
        # a stage that is busy with a long step.
        self._buffers = self._entries = stages + 1
        self._row_bytes = hidden_size * dtype.itemsize
        self._buffer_bytes = _aligned(max_tokens * self._row_bytes)
        self._most_tokens = max_tokens
        # Kernels are compiled once for aligned addresses and once more for others.
        self._most_rows = -(-max_rows // 4) * 4
        self._entry_bytes = _aligned(2 * self._most_rows * 4)
        self._activations_at = _aligned(_RING + self._entries * self._entry_bytes)
        size = self._activations_at + (self._buffers * self._buffer_bytes if stage > 0 else 0)
        self._block = driver.allocate(size)
        self._size = size
        self._entry_views = self._views(self._block + _RING, self._entries, self._entry_bytes)
        if stage > 0:
            self._incoming = [
                driver.tensor(self._block + self._buffer_of(n), (max_tokens, hidden_size), dtype)
                for n in range(self._buffers)
            ]
        if stage < self._last:
            self._outgoing_at = driver.allocate(_OUTGOING * self._buffer_bytes)
            self._outgoing = [
                driver.tensor(self._outgoing_of(n), (max_tokens, hidden_size), dtype)
                for n in range(_OUTGOING)
            ]
            self._size += _OUTGOING * self._buffer_bytes
            self._sender = driver.stream()
            self._filled = driver.event()
            self._sent = [driver.event() for _ in range(_OUTGOING)]
        if stage == self._last:
            self._drawn_at = driver.allocate(self._entries * self._entry_bytes)
            self._drawn_views = self._views(self._drawn_at, self._entries, self._entry_bytes)
            self._size += self._entries * self._entry_bytes
            self._drawn = driver.event()
        if stage in (0, self._last):
            self._token_stream = driver.stream()
        self._last_sent: int | None = None
        self._last_expected: int | None = None
        self._before = self._after = self._first = 0
        exchange.publish(_key(stage), driver.export(self._block).hex())

    def connect(self) -> None:
        """Map the neighbours' blocks. Raises LinkRefusedError where the machine does not allow it.

        A block that is never exported (its stage was refused one) is published as no text.
        """
        if self._stage > 0:
            self._before = self._open(self._stage - 1)
        if self._stage < self._last:
            self._after = self._open(self._stage + 1)
        if self._stage == self._last:
            self._first = self._before if self._last == 1 else self._open(0)
        # Already true; a driver that cannot wait on memory says so here.
        self._driver.wait(self._compute, self._block + _ARRIVED, 0)

    def _open(self, stage: int) -> int:
        handle = self._exchange.lookup(_key(stage))
        if not handle:
            raise LinkRefusedError(f"stage {stage} has no memory to share")
        return self._driver.open(bytes.fromhex(handle))

    @staticmethod
    def give_up(stage: int, exchange: Exchange) -> None:
        """Tell the neighbours that this stage has no block, so that none waits for it."""
        exchange.publish(_key(stage), "")

    @property
    def device_bytes(self) -> int:
        return self._size

    # ---- activations

    def outgoing(self, number: int, rows: int) -> Tensor:
        self._driver.wait_event(self._compute, self._sent[number % _OUTGOING])
        return self._outgoing[number % _OUTGOING][:rows]

    def send(self, number: int, rows: int) -> None:
        driver, sender = self._driver, self._sender
        driver.record(self._filled, self._compute)
        driver.wait_event(sender, self._filled)
        # The buffer's last rows have been taken out.
        driver.wait(sender, self._block + _CREDIT, self._word(number - self._buffers))
        target = self._after + self._buffer_of(number)
        driver.copy(sender, target, self._outgoing_of(number), rows * self._row_bytes)
        driver.write(sender, self._after + _ARRIVED, self._word(number))
        driver.record(self._sent[number % _OUTGOING], sender)
        self._last_sent = number

    def incoming(self, number: int, rows: int) -> Tensor:
        self._driver.wait(self._compute, self._block + _ARRIVED, self._word(number))
        return self._incoming[number % self._buffers][:rows]

    def taken(self, number: int) -> None:
        self._driver.write(self._compute, self._before + _CREDIT, self._word(number))

    # ---- sampled tokens

    def outgoing_tokens(self, number: int) -> Tensor:
        return self._drawn_views[number % self._entries]

    def send_tokens(self, number: int) -> None:
        driver, stream = self._driver, self._token_stream
        driver.record(self._drawn, self._compute)
        driver.wait_event(stream, self._drawn)
        entry = self._entry_of(number)
        driver.copy(stream, self._first + _RING + entry, self._drawn_at + entry, self._entry_bytes)
        driver.write(stream, self._first + _TOKENS, self._word(number))

    def expect_tokens(self, number: int) -> None:
        self._last_expected = number

    def incoming_tokens(self, number: int) -> Tensor:
        self._driver.wait(self._compute, self._block + _TOKENS, self._word(number))
        return self._entry_views[number % self._entries]

    # ---- start and end

    def warm_up(self) -> None:
        """Every buffer of every edge carries known rows once, under the numbers below 0."""
        rows = min(_CHECKED_ROWS, self._most_tokens)
        for number in range(-self._buffers, 0):
            if self._stage > 0:
                found = self.incoming(number, rows)
                self._expect(self._compute, self._stage - 1, self._stage)
                self._compare(found, self._pattern(number, rows), self._stage - 1, self._stage)
                self.taken(number)
            if self._stage < self._last:
                self.outgoing(number, rows).copy_(self._pattern(number, rows))
                self.send(number, rows)
                self._expect(self._sender, self._stage, self._stage + 1)
        if self._stage < self._last:
            self._driver.wait(self._sender, self._block + _CREDIT, self._word(-1))
            self._expect(self._sender, self._stage + 1, self._stage)
        drawn = torch.arange(2 * self._most_rows, dtype=torch.int32).view(2, -1)
        if self._stage == self._last:
            self.outgoing_tokens(-1).copy_(drawn)
            self.send_tokens(-1)
            self._expect(self._token_stream, self._last, 0)
        if self._stage == 0:
            found = self.incoming_tokens(-1)
            self._expect(self._compute, self._last, 0)
            self._compare(found, drawn, self._last, 0)

    def _pattern(self, number: int, rows: int) -> Tensor:
        """Whole numbers that even bfloat16 holds exactly, different in every message."""
        values = torch.arange(rows * self._width).remainder(127) + (number + self._buffers)
        return values.view(rows, self._width).to(self._dtype)

    def _expect(self, stream: int, source: int, target: int) -> None:
        if not self._driver.finished_within([stream], _CHECK_SECONDS):
            raise EngineDeadError(
                f"The link from stage {source} to stage {target} by {self.name} carried nothing "
                f"within {_CHECK_SECONDS:.0f} s; use --transport nccl."
            )

    def _compare(self, found: Tensor, expected: Tensor, source: int, target: int) -> None:
        if not torch.equal(found.cpu(), expected):
            raise EngineDeadError(
                f"The link from stage {source} to stage {target} by {self.name} carried wrong "
                "values; use --transport nccl."
            )

    def close(self) -> None:
        waited = []
        if self._stage < self._last and self._last_sent is not None:
            # The next stage writes into this stage's memory when it has taken the last rows.
            self._driver.wait(self._sender, self._block + _CREDIT, self._word(self._last_sent))
            waited.append(self._sender)
        if self._stage == 0 and self._last_expected is not None:
            self._driver.wait(
                self._token_stream, self._block + _TOKENS, self._word(self._last_expected)
            )
        if self._stage in (0, self._last):
            waited.append(self._token_stream)
        self._driver.finished_within([*waited, self._compute], _CLOSE_SECONDS)

    # ---- places

    def _word(self, number: int) -> int:
        """The word for a micro-batch; the first message of all is 1, as memory starts at 0."""
        return (number + self._buffers + 1) % _WORD

    def _outgoing_of(self, number: int) -> int:
        return self._outgoing_at + number % _OUTGOING * self._buffer_bytes

    def _buffer_of(self, number: int) -> int:
        return self._activations_at + number % self._buffers * self._buffer_bytes

    def _entry_of(self, number: int) -> int:
        return number % self._entries * self._entry_bytes

    def _views(self, address: int, count: int, step: int) -> list[Tensor]:
        shape = (2, self._most_rows)
        return [self._driver.tensor(address + at * step, shape, torch.int32) for at in range(count)]


def _key(stage: int) -> str:
    return f"peer-{stage}"


def _aligned(size: int) -> int:
    return -(-size // 512) * 512
