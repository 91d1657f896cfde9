"""Looking at an engine's processes from outside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil


def children_of(pid: int, module: str) -> list[psutil.Process]:
    """Living descendants of a process that run `python -m module`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if module in process.cmdline():
                found.append(process)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        for process in processes
        if psutil.pid_exists(process.pid)
    )


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether the condition became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
