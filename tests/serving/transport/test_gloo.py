"""Several stages' links in one process, a thread a stage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from serving.errors import EngineDeadError
from serving.transport.gloo import GlooTransport

WIDTH = 3


def run_stages(
    stages: int, folder: Path, work: Callable[[int, GlooTransport], None], *, wait: bool = True
) -> None:
    """Connect `stages` transports and run `work` on each; errors of any are raised.

    Unless `wait` is false, all links stay open until every stage is done.
    """
    errors: list[BaseException] = []
    all_done = threading.Barrier(stages)

    def run(stage: int) -> None:
        try:
            transport = GlooTransport(
                stage,
                stages,
                str(folder / "rendezvous"),
                max_tokens=64,
                hidden_size=WIDTH,
                dtype=torch.float32,
            )
            transport.warm_up()
            work(stage, transport)
            transport.close()
            if wait:
                all_done.wait(20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(stage,), daemon=True) for stage in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20 if not errors else 0)
    for error in errors:
        raise error
    assert not any(thread.is_alive() for thread in threads), "a stage hangs"


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_activations_and_tokens_arrive_in_order_and_whole(stages: int, tmp_path: Path) -> None:
    """The sender overwrites its tensor at once, and a slow receiver must not see it."""
    steps = 25

    def work(stage: int, transport: GlooTransport) -> None:
        received: list[int] = []
        scratch = torch.zeros(64, WIDTH)
        for step in range(steps):
            rows = 1 + step % 7
            if stage == 0:
                transport.expect_tokens(rows)
                scratch[:rows] = float(step)
                transport.send_hidden(scratch[:rows])
                scratch.fill_(-1.0)
                continue
            hidden = transport.receive_hidden(rows)
            assert hidden.shape == (rows, WIDTH)
            assert (hidden == float(step + stage - 1)).all()
            if stage < stages - 1:
                transport.send_hidden(hidden + 1.0)
            else:
                transport.send_tokens(torch.full((rows,), step, dtype=torch.int64))
        if stage == 0:
            for step in range(steps):
                tokens = transport.receive_tokens()
                assert len(tokens) == 1 + step % 7
                received += set(tokens.tolist())
            assert received == list(range(steps))

    run_stages(stages, tmp_path, work)


def test_a_send_waits_for_a_buffer_and_says_so(tmp_path: Path) -> None:
    gate = threading.Event()

    def work(stage: int, transport: GlooTransport) -> None:
        if stage == 0:
            transport.send_hidden(torch.zeros(1, WIDTH))
            transport.send_hidden(torch.ones(1, WIDTH))
            threading.Timer(0.05, gate.set).start()
            transport.send_hidden(torch.full((1, WIDTH), 2.0))
            assert transport.seconds_waited > 0.01
        else:
            assert gate.wait(30)
            seen = [float(transport.receive_hidden(1)[0, 0]) for _ in range(3)]
            assert seen == [0.0, 1.0, 2.0]

    run_stages(2, tmp_path, work)


def test_everything_listens_on_loopback_only(tmp_path: Path) -> None:
    def work(stage: int, transport: GlooTransport) -> None:
        mine = psutil.Process().net_connections(kind="inet")
        assert mine
        assert all(item.laddr.ip in ("127.0.0.1", "::1") for item in mine)

    run_stages(2, tmp_path, work)


def test_a_link_whose_other_side_is_gone_says_so(tmp_path: Path) -> None:
    def work(stage: int, transport: GlooTransport) -> None:
        if stage == 1:
            transport.receive_hidden(1)

    with pytest.raises(EngineDeadError, match="the link to stage 0 broke"):
        run_stages(2, tmp_path, work, wait=False)
