"""A stage's sockets: plans in, results and news out."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import zmq
from torch import Tensor

from serving.messages import FromStage, StageFailed, StepResult, ToStage, socket_address
from serving.sampling import SampleOutput

_QUEUE = 1024  # far more than can be in flight; a full queue means that the driver is gone


class DriverLinks:
    """One PULL socket for plans and one PUSH socket for everything that goes back."""

    def __init__(self, directory: str, worker: int) -> None:
        self._context = zmq.Context()
        self._plans = self._context.socket(zmq.PULL)
        self._plans.set_hwm(_QUEUE)
        self._plans.connect(socket_address(directory, f"plans-{worker}"))
        self._results = self._context.socket(zmq.PUSH)
        self._results.set_hwm(_QUEUE)
        self._results_address = socket_address(directory, "results")
        self._results.connect(self._results_address)
        self._others: list[zmq.Socket[bytes]] = []
        self._decoder: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
        self._encoder = msgspec.msgpack.Encoder()

    def next(self, seconds: float | None) -> ToStage | None:
        """The next message, or None if none came in so many seconds (None: wait for ever)."""
        timeout = None if seconds is None else int(seconds * 1000)
        if not self._plans.poll(timeout):
            return None
        return self._decoder.decode(self._plans.recv())

    def send(self, message: FromStage) -> None:
        self._results.send(self._encoder.encode(message))

    def send_result(self, number: int, output: SampleOutput | None) -> None:
        """Tell the driver that a micro-batch is finished, with the tokens it sampled."""
        if output is None:
            self.send(StepResult(number=number))
            return
        tokens = _bytes(output.token_ids, np.dtype("<i4"))
        if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
            self.send(StepResult(number=number, tokens=tokens))
            return
        self.send(
            StepResult(
                number=number,
                tokens=tokens,
                logprobs=_bytes(output.logprobs, np.dtype("<f4")),
                top_ids=_bytes(output.top_ids, np.dtype("<i4")),
                top_logprobs=_bytes(output.top_logprobs, np.dtype("<f4")),
                top_k=output.top_ids.shape[1],
            )
        )

    def another(self) -> ResultSender:
        """A way back to the driver for another thread than this object's."""
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(_QUEUE)
        socket.connect(self._results_address)
        self._others.append(socket)
        return ResultSender(socket)

    def close(self) -> None:
        """Send what is queued, within a second, and close."""
        self._plans.close(linger=0)
        for socket in (self._results, *self._others):
            socket.close(linger=1000)
        self._context.term()


class ResultSender:
    """Sends to the driver from a thread of its own; closed with the links it came from."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromStage) -> None:
        self._socket.send(self._encoder.encode(message))

    def fail(self, stage: int, what: str, rank: int = 0) -> None:
        """Say why the process is about to end, and give the message a moment to leave."""
        self.send(StageFailed(stage, "dead", what, rank=rank))
        threading.Event().wait(0.2)


def _bytes(tensor: Tensor, dtype: np.dtype[np.generic]) -> bytes:
    return tensor.cpu().numpy().astype(dtype, copy=False).tobytes()
