"""What a stage takes and gives around a step, against links that keep what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.stage.gpu.flow import Flow
from serving.stage.mirror import Rows
from serving.transport.base import StreamTransport

WIDTH = 2


class _Links(StreamTransport):
    name = "lists"
    device_bytes = 0

    def __init__(self) -> None:
        self.buffer = torch.full((8, WIDTH), -1.0)
        self.entry = torch.full((2, 6), -1, dtype=torch.int32)
        self.calls: list[tuple[Any, ...]] = []

    def warm_up(self) -> None: ...

    def outgoing(self, number: int, rows: int) -> Tensor:
        self.calls.append(("outgoing", number, rows))
        return self.buffer[:rows]

    def send(self, number: int, rows: int) -> None:
        self.calls.append(("send", number, rows))

    def incoming(self, number: int, rows: int) -> Tensor:
        self.calls.append(("incoming", number, rows))
        return torch.full((rows, WIDTH), float(number))

    def taken(self, number: int) -> None:
        self.calls.append(("taken", number))

    def outgoing_tokens(self, number: int) -> Tensor:
        self.calls.append(("outgoing_tokens", number))
        return self.entry

    def send_tokens(self, number: int) -> None:
        self.calls.append(("send_tokens", number))

    def expect_tokens(self, number: int) -> None:
        self.calls.append(("expect", number))

    def incoming_tokens(self, number: int) -> Tensor:
        self.calls.append(("incoming_tokens", number))
        return torch.tensor([[4, 1, 9, 9], [number, number + 1, 9, 9]], dtype=torch.int32)

    def close(self) -> None: ...


class _Times:
    def __init__(self) -> None:
        self.waits: list[str] = []

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        self.waits.append(kind)
        yield


def _keep(slots: Tensor, tokens: Tensor, last_tokens: Tensor) -> None:
    last_tokens[slots.long()] = tokens


def _rows(number: int, *, tokens: int = 3, sampled: int = 2, reads_from: int = -1) -> Rows:
    return Rows(
        number=number,
        slots=np.array([4, 1]),
        num_decodes=2,
        positions=np.arange(tokens),
        slot_mapping=np.arange(tokens),
        query_starts=np.array([0, 1, 2], dtype=np.int32),
        context_lens=np.array([1, 1], dtype=np.int32),
        page_tables=np.zeros((1, 1), dtype=np.int32),
        prompt_tokens=np.zeros(0, dtype=np.int64),
        sampled_slots=np.array([4, 1])[:sampled],
        sampled_tokens=np.array([0, 1])[:sampled],
        sampled_positions=np.array([5, 6])[:sampled],
        reads_from=reads_from,
    )


def _flow(stage: int, stages: int) -> tuple[Flow, _Links, Tensor]:
    links, last_tokens = _Links(), torch.full((6,), -1, dtype=torch.int32)
    kernels: Any = SimpleNamespace(keep_tokens=_keep)
    return Flow(links, stage, stages, kernels, last_tokens), links, last_tokens


def test_a_middle_stage_copies_what_comes_and_gives_no_padding_away() -> None:
    flow, links, _ = _flow(1, 3)
    hidden, times = torch.zeros(6, WIDTH), _Times()
    flow.enter(_rows(7), hidden, times)  # type: ignore[arg-type]
    assert hidden[:3].eq(7.0).all()
    assert hidden[3:].eq(0.0).all()
    flow.leave(_rows(7), hidden + 1, times)  # type: ignore[arg-type]
    assert links.buffer[:3].eq(8.0).all()
    assert links.buffer[3:].eq(-1.0).all()
    assert links.calls == [
        ("incoming", 7, 3), ("taken", 7), ("outgoing", 7, 3), ("send", 7, 3)
    ]  # fmt: skip
    assert times.waits == ["wait_input", "wait_link"]


def test_the_first_stage_takes_tokens_when_they_are_read() -> None:
    flow, links, last_tokens = _flow(0, 2)
    times: Any = _Times()
    flow.enter(_rows(0), None, times)
    flow.enter(_rows(1, sampled=0), None, times)
    assert last_tokens.eq(-1).all()
    flow.enter(_rows(2, reads_from=0), None, times)
    assert last_tokens.tolist() == [-1, 1, -1, -1, 0, -1]
    assert [call for call in links.calls if call[0] != "expect"] == [("incoming_tokens", 0)]
    assert [call[1] for call in links.calls if call[0] == "expect"] == [0, 2]
    assert times.waits == ["wait_input"]


def test_the_first_stage_takes_tokens_that_nobody_reads_before_the_links_lose_them() -> None:
    """Sequences of one token only: no decode ever reads a token."""
    for stages in (2, 4):
        flow, links, last_tokens = _flow(0, stages)
        times: Any = _Times()
        for number in range(20):
            flow.enter(_rows(number), None, times)
            taken = [call[1] for call in links.calls if call[0] == "incoming_tokens"]
            assert taken == list(range(number - stages))
        assert last_tokens[4] == 19 - stages - 1


def test_the_last_stage_gives_slots_and_tokens() -> None:
    flow, links, _ = _flow(1, 2)
    slots = torch.tensor([3, 0, 2], dtype=torch.int32)
    flow.give_tokens(5, slots, torch.tensor([30, 31, 32], dtype=torch.int32))
    assert links.entry[:, :3].tolist() == [[3, 0, 2], [30, 31, 32]]
    assert links.entry[:, 3:].eq(-1).all()
    assert links.calls == [("outgoing_tokens", 5), ("send_tokens", 5)]
