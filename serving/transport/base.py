"""The contracts of a transport between the stages of one group: on the host, and on streams."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Transport(ABC):
    """One stage's links: activations from the stage before and to the one after, and the path of
    sampled tokens from the last stage to the first, which activations never share.

    Micro-batches pass every link in the order of their plans. An activation is one tensor, the
    residual already added. `seconds_waited` counts the time for which a send had to wait until a
    buffer was free again.
    """

    seconds_waited: float = 0.0

    @abstractmethod
    def warm_up(self) -> None:
        """Use every link once, in one order that all stages agree on."""

    @abstractmethod
    def send_hidden(self, hidden: Tensor) -> None:
        """Send [T, H] to the next stage. `hidden` may be overwritten when this returns."""

    @abstractmethod
    def receive_hidden(self, num_tokens: int) -> Tensor:
        """[T, H] of the stage before; valid until the next call."""

    @abstractmethod
    def send_tokens(self, tokens: Tensor) -> None:
        """On the last stage: send sampled ids, [R] int64, to the first."""

    @abstractmethod
    def expect_tokens(self, count: int) -> None:
        """On the first stage: `count` ids of the next sampling micro-batch will come."""

    @abstractmethod
    def receive_tokens(self) -> Tensor:
        """The ids expected first of those not received yet, [R] int64; waits for them."""

    @abstractmethod
    def close(self) -> None:
        """Let what was sent arrive, within a second a link, and let go."""


class StreamTransport(ABC):
    """The same links between stages on GPUs. No call waits on the host.

    "The stream" is the one stream on which the stage computes; what a call returns is valid for
    work that is launched on it afterwards. Micro-batches go by the `number` of their plan, which
    only grows. Every stage launches everything of a micro-batch before anything of a later one, and
    whatever it makes a stream wait for belongs to an earlier micro-batch or to an earlier stage of
    the same one. So streams that share a hardware queue, or a launch that has to wait for the
    device, can delay work but never lock the stages up.
    """

    name: str

    @abstractmethod
    def warm_up(self) -> None:
        """Use every link and see that what arrives is right, in one order that all stages agree
        on. Raises EngineDeadError, naming the link, if something does not arrive."""

    @abstractmethod
    def outgoing(self, number: int, rows: int) -> Tensor:
        """[rows, H] to fill on the stream, which waits until its last send has read it."""

    @abstractmethod
    def send(self, number: int, rows: int) -> None:
        """What the stream has put into `outgoing` goes to the next stage."""

    @abstractmethod
    def incoming(self, number: int, rows: int) -> Tensor:
        """[rows, H] of the stage before; the stream waits for them. Only read them."""

    @abstractmethod
    def taken(self, number: int) -> None:
        """Behind the work launched so far the rows of `incoming` are not needed any more."""

    @abstractmethod
    def outgoing_tokens(self, number: int) -> Tensor:
        """On the last stage: [2, most rows] int32 to fill with slots and the ids drawn for them."""

    @abstractmethod
    def send_tokens(self, number: int) -> None:
        """What the stream has put into `outgoing_tokens` goes to the first stage."""

    @abstractmethod
    def expect_tokens(self, number: int) -> None:
        """On the first stage: this micro-batch, planned just now, will send tokens."""

    @abstractmethod
    def incoming_tokens(self, number: int) -> Tensor:
        """On the first stage: [2, most rows] as sent; the stream waits for them.

        Must be called in order, and before the first stage computes micro-batch
        number + stages + 1: the links keep no more of them, and no stage runs further ahead.
        """

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """GPU memory that the links take."""

    @abstractmethod
    def close(self) -> None:
        """Let what was sent arrive, within a second, and let go."""
