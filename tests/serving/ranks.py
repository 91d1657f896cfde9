"""Ranks of a tensor-parallel stage in one process, a thread a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from serving.transport.tensor_group import TensorGroup, connect_ranks

__all__ = ["run_ranks"]

T = TypeVar("T")


def run_ranks(
    size: int, folder: Path, work: Callable[[TensorGroup], T], *, together: bool = True
) -> list[T]:
    """What `work` returns on each rank, connected over gloo; errors of any rank are raised.

    Unless `together` is false, links stay open until every rank is done.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    all_done = threading.Barrier(size)

    def run(rank: int) -> None:
        try:
            group = connect_ranks(str(folder), 0, rank, size, torch.device("cpu"))
            results[rank] = work(group)
            if together:
                all_done.wait(60)
        except BaseException as error:
            errors.append(error)
            all_done.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return [results[rank] for rank in range(size)]
