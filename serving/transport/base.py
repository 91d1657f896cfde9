"""The contract of a transport between the stages of one group."""

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
