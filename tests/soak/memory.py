"""Memory of a process and all below it."""

from __future__ import annotations

import psutil


def memory_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and all below it: shared pages count once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total
