"""One stage of a pipeline that only checks its links: a process of `test_peer_gpu.py`.

    python -m tests.serving.transport.gpu_stage STAGE STAGES DEVICE SHARED RENDEZVOUS KIND SEED LOAD

Prints one JSON object: how many values were wrong, and how long a micro-batch took. LOAD "random"
runs matrix products of random length around the transfers, on the stages in different places, and
sizes are random too; a number is the rows of every micro-batch, without load.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque

import torch
from torch import Tensor

from serving.transport.connect import StoreExchange, connect_stages

WIDTH, MOST, ROWS, STEPS = 5120, 2048, 256, 300


class Checker:
    """Known rows for every number, and a count of the values that differ from them."""

    def __init__(self, device: torch.device) -> None:
        at = torch.arange(MOST * WIDTH, device=device, dtype=torch.int32)
        self._pattern = at.remainder(127).view(MOST, WIDTH).to(torch.bfloat16)
        self._tokens = torch.arange(ROWS, device=device, dtype=torch.int32)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)

    def rows(self, number: int, count: int) -> Tensor:
        return self._pattern[:count] + number % 64

    def tokens(self, number: int, count: int) -> Tensor:
        return self._tokens[:count] + 1000 * number

    def compare(self, found: Tensor, expected: Tensor) -> None:
        self.wrong += (found != expected).sum()


def main() -> None:
    stage, stages, device_name, shared, path, kind, seed, load = sys.argv[1:]
    number_of, last = int(stage), int(stages) - 1
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    links, sentence = connect_stages(
        kind, number_of, int(stages), stream, StoreExchange(path, int(stages)),
        max_tokens=MOST, hidden_size=WIDTH, dtype=torch.bfloat16, max_rows=ROWS,
        shared=shared == "1",
    )  # fmt: skip
    plans = random.Random(int(seed))
    own = random.Random(1000 * int(seed) + number_of)
    checker = Checker(device)
    heavy = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    scratch = torch.empty_like(heavy)

    def work() -> None:
        if load == "random":
            for _ in range(own.choice((0, 0, 1, 30))):
                torch.mm(heavy, heavy, out=scratch)

    hidden = torch.zeros(MOST, WIDTH, device=device, dtype=torch.bfloat16)
    expected: deque[tuple[int, int]] = deque()
    work()
    stream.synchronize()
    started = time.perf_counter()
    for number in range(STEPS):
        count = plans.choice((1, 7, 64, 500, MOST)) if load == "random" else int(load)
        drawn = plans.choice((0, 1, ROWS)) if load == "random" else 16
        behind = plans.choice((1, 1, 2)) if load == "random" else 1
        if number_of == 0:
            while expected and expected[0][0] <= max(number - behind, number - last - 2):
                before, rows = expected.popleft()
                entry = links.incoming_tokens(before)
                work()
                checker.compare(entry[1, :rows], checker.tokens(before, rows))
            hidden[:count] = checker.rows(number, count)
            if drawn:
                expected.append((number, drawn))
                links.expect_tokens(number)
        else:
            found = links.incoming(number, count)
            work()
            hidden[:count].copy_(found)
            links.taken(number)
            checker.compare(hidden[:count], checker.rows(number, count))
        work()
        if number_of < last:
            links.outgoing(number, count).copy_(hidden[:count])
            links.send(number, count)
            hidden.fill_(-1.0)
        elif drawn:
            entry = links.outgoing_tokens(number)
            entry[1, :drawn] = checker.tokens(number, drawn)
            links.send_tokens(number)
    launched = time.perf_counter() - started
    stream.synchronize()
    taken = time.perf_counter() - started
    wrong = int(checker.wrong)
    links.close()
    print(
        json.dumps(
            {
                "stage": number_of, "links": sentence, "wrong": wrong,
                "launched_ms": 1000 * launched / STEPS, "ms": 1000 * taken / STEPS,
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
