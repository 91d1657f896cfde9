"""Tensors between stage processes of one host over gloo, on the loopback interface only."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.base import Transport

# The type stubs of torch know only a part of what is used here.
dist: Any = torch.distributed

_BUFFERS = 2  # an edge; a buffer is written again only after its last send has finished
_HIDDEN, _TOKENS = 1, 2
_CLOSE_SECONDS = 1


class GlooTransport(Transport):
    """Two communicators, one for activations and one for tokens, found through a file.

    `rendezvous` is the path of a file that all stages of the group share and nobody else can read.
    Waiting inside a send or receive ends with EngineDeadError when the other side dies.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        rendezvous: str,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._stage = stage
        self._last = stages - 1
        store = dist.FileStore(rendezvous, stages)
        self._hidden_links = loopback_links(store, "hidden", stage, stages)
        self._token_links = loopback_links(store, "tokens", stage, stages)
        shape = (max_tokens, hidden_size)
        self._incoming = torch.zeros(shape if stage > 0 else (0, hidden_size), dtype=dtype)
        outgoing = shape if stage < self._last else (0, hidden_size)
        self._outgoing = [torch.zeros(outgoing, dtype=dtype) for _ in range(_BUFFERS)]
        self._sends: deque[Any] = deque()  # one a buffer in use, oldest first
        self._turn = 0
        self._token_sends: deque[tuple[Any, Tensor]] = deque()
        self._token_receives: deque[tuple[Any, Tensor]] = deque()

    def warm_up(self) -> None:
        if self._stage > 0:
            self.receive_hidden(1)
        if self._stage < self._last:
            self.send_hidden(torch.zeros_like(self._outgoing[0][:1]))
        if self._stage == 0:
            self.expect_tokens(1)
            self.receive_tokens()
        if self._stage == self._last:
            self.send_tokens(torch.zeros(1, dtype=torch.int64))

    def send_hidden(self, hidden: Tensor) -> None:
        if len(self._sends) == _BUFFERS:
            started = time.perf_counter()
            _finish(self._sends.popleft(), self._stage + 1)
            self.seconds_waited += time.perf_counter() - started
        buffer = self._outgoing[self._turn][: hidden.shape[0]]
        self._turn = (self._turn + 1) % _BUFFERS
        buffer.copy_(hidden)
        self._sends.append(self._hidden_links.send([buffer], self._stage + 1, _HIDDEN))

    def receive_hidden(self, num_tokens: int) -> Tensor:
        buffer = self._incoming[:num_tokens]
        _finish(self._hidden_links.recv([buffer], self._stage - 1, _HIDDEN), self._stage - 1)
        return buffer

    def send_tokens(self, tokens: Tensor) -> None:
        # The first stage posts its receive when it gets the plan, so these never pile up.
        while self._token_sends and self._token_sends[0][0].is_completed():
            self._token_sends.popleft()
        tokens = tokens.contiguous()
        self._token_sends.append((self._token_links.send([tokens], 0, _TOKENS), tokens))

    def expect_tokens(self, count: int) -> None:
        tokens = torch.empty(count, dtype=torch.int64)
        work = self._token_links.recv([tokens], self._last, _TOKENS)
        self._token_receives.append((work, tokens))

    def receive_tokens(self) -> Tensor:
        work, tokens = self._token_receives.popleft()
        _finish(work, self._last)
        return tokens

    def close(self) -> None:
        # A send that nobody takes any more ends with an error, which is no news at this point.
        with contextlib.suppress(RuntimeError):
            for work in (*self._sends, *(work for work, _ in self._token_sends)):
                work.wait(timedelta(seconds=_CLOSE_SECONDS))
        self._sends.clear()
        self._token_sends.clear()
        self._token_receives.clear()


def _finish(work: Any, peer: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise EngineDeadError(f"the link to stage {peer} broke") from error


def loopback_links(store: Any, name: str, number: int, count: int) -> Any:
    """A gloo process group of `count` processes of this host, of which this is `number`."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    # A stage that is idle has posted nothing, and the driver watches over the time of a step.
    options._timeout = timedelta(days=1)
    links = dist.PrefixStore(name, store)
    return dist.ProcessGroupGloo(links, number, count, options)
