"""What a row says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """The commit of the working copy, with `+` when files differ from it; None without one."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> str:
    """Processor, cores this process may use, memory, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    gpu = f", {_gpu_name()}" if on_gpu("auto") else ""
    return f"{name}, {cores} cores, {_memory('MemTotal') / (1 << 30):.0f} GiB{gpu}"


def on_gpu(device: str) -> bool:
    """Whether an engine with this `--device` runs on a GPU here."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def memory_available() -> int:
    """Bytes of memory that can be taken now."""
    return _memory("MemAvailable")


def _memory(key: str) -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 4 << 30


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
