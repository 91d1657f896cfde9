"""Child processes that never outlive their parent.

A child is `python -m MODULE` and reads its settings as JSON from standard input. It asks the
kernel to be killed when its parent dies, so `kill -9` of any process ends everything below it.
The parent holds the read end of a pipe whose write end only the child has: it becomes readable
when the child is gone, so a poll can wait for a death and for messages at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PREFIX = "lectern-"


def die_with_parent(parent_pid: int) -> None:
    """Called first thing in a child. Exits at once if the parent is gone already.

    The kernel ties this to the parent's *thread* that made the child, which must therefore live as
    long as the child should.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused to tie this process to its parent")
    if os.getppid() != parent_pid:
        os._exit(1)
    # Ctrl-C reaches the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Child:
    """A running child process; `fileno()` becomes readable when it has ended."""

    def __init__(
        self, module: str, settings: bytes, environment: Mapping[str, str] | None = None
    ) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._gone, held_by_child = os.pipe()
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
                pass_fds=(held_by_child,),
                process_group=0,
            )
        except BaseException:
            os.close(self._gone)
            raise
        finally:
            os.close(held_by_child)
        if self._popen.stdin is None:
            raise AssertionError("a child has standard input")
        # A child that died before it read shows itself through fileno().
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(settings)
            self._popen.stdin.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fileno(self) -> int:
        return self._gone

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def wait(self, seconds: float) -> bool:
        """Wait until it ended, at most so long; tells whether it did."""
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now, whatever it is doing, and collect it."""
        if not self.has_ended():
            self._popen.kill()
        self._popen.wait()

    def forget(self) -> None:
        """Close what the parent holds of an ended child."""
        if self._gone >= 0:
            os.close(self._gone)
            self._gone = -1

    def how_it_ended(self) -> str:
        """A phrase such as "was killed by signal 9 (SIGKILL)"."""
        code = self._popen.poll()
        if code is None:
            return "is still running"
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"

    @property
    def was_killed(self) -> bool:
        code = self._popen.poll()
        return code is not None and code < 0


def _has_descriptor(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True


def make_group_directory() -> Path:
    """A fresh directory of mode 0700 for the sockets of one group, short enough for ipc names.

    Directories of engines that were killed are removed on the way: their name holds the pid.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 40:
        base = Path("/tmp")
    for old in base.glob(f"{_PREFIX}[0-9]*-*"):
        pid = old.name.removeprefix(_PREFIX).split("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdigit() and old.stat().st_uid == os.getuid() and not _lives(int(pid)):
                remove_group_directory(old)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))


def remove_group_directory(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
