"""Starts Lectern's processes, watches them, starts a dead one again, and leaves nothing behind.

The supervisor has one thread. It may therefore set the parent-death signal between fork and
exec: a child is killed by the kernel the moment its supervisor is gone, however it went. Each
child leads a process group of its own, so that Ctrl-C reaches the supervisor alone and a stop
reaches the whole group.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import http.client
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

#: Seconds a child has between SIGTERM and SIGKILL.
STOP_SECONDS = 10.0
#: Seconds between two starts of the same service: doubled at each death, up to the last.
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
#: A service that was healthy this long is forgiven its earlier deaths.
FORGIVE_SECONDS = 60.0
#: A log file is moved aside to `.1` when it grows past this many bytes.
LOG_BYTES = 20 * 1024 * 1024
_TICK_SECONDS = 0.2
#: Exit code by which a part says: the configuration is wrong, starting again will not help.
BAD_CONFIGURATION = 2
#: How the sentence begins that a part ends with.
_FATAL = "lectern: "


class SupervisorError(Exception):
    """The sentence to show; `exit_code` is what the command should end with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    `health` is (host, port, path) of an HTTP address of this machine that answers 200 when the
    service is ready; None means that it is ready once started.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: tuple[str, int, str] | None = None


@dataclass
class _Child:
    service: Service
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    healthy_since: float | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    deaths: int = 0
    shown: int = 0  # bytes of the log already shown on the terminal


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on `host`:`port` now; OSError when it never could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def lock_home(home: Path) -> IO[str]:
    """Take the lock of a state directory; it is freed when this process ends.

    Raises:
        SupervisorError: another supervisor holds it.
    """
    run = home / "run"
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = open(run / "lock", "a+", encoding="ascii")  # noqa: SIM115 - held for life
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise SupervisorError(
            f"Lectern is already running on {home} (process {owner}). "
            "Stop it first, or choose another directory with --home.",
            BAD_CONFIGURATION,
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def die_with_parent(parent: int) -> Callable[[], None]:
    """A `preexec_fn` for a single-threaded parent: the kernel kills the child when it is gone."""

    def in_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have gone between fork and prctl; then no signal will ever come.
        if os.getppid() != parent:
            os._exit(1)

    return in_child


class Supervisor:
    """Keeps a list of services running until a signal asks it to stop."""

    def __init__(
        self,
        services: Sequence[Service],
        log_folder: Path,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._say = say
        self._children = [_Child(s, log_folder / f"{s.name}.log") for s in services]
        self._stop_signal: int | None = None
        self._selector = selectors.DefaultSelector()

    def run(self, on_ready: Callable[[], None], start_seconds: float = 600.0) -> int:
        """Start everything, call `on_ready` once, and watch until SIGINT or SIGTERM.

        Returns the exit code of the command. Raises SupervisorError when a service could not be
        started at all.
        """
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        }
        old_wake = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ)
        try:
            deadline = time.monotonic() + start_seconds
            for child in self._children:
                self._start(child)
            announced = False
            while self._stop_signal is None:
                for _ in self._selector.select(_TICK_SECONDS):
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                self._look_after_children(first_start=not announced)
                if not announced and all(c.healthy_since is not None for c in self._children):
                    announced = True
                    on_ready()
                elif not announced and time.monotonic() > deadline:
                    late = ", ".join(
                        c.service.name for c in self._children if c.healthy_since is None
                    )
                    raise SupervisorError(
                        f"Not ready after {start_seconds:.0f} s: {late}. "
                        f"The reason should be in {self._children[0].log_path.parent}."
                    )
            self._say("Stopping.")
            return 0
        finally:
            self.stop()
            self._selector.unregister(wake_read)
            signal.set_wakeup_fd(old_wake)
            os.close(wake_read)
            os.close(wake_write)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """End every child and its process group: SIGTERM, then SIGKILL. Safe to call twice."""
        running = [c.process for c in self._children if c.process is not None]
        for process in reversed(running):
            _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            # Also when the leader has ended: something in its group may still be there.
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        for child in self._children:
            child.process = None

    def _on_signal(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self._stop_signal = number

    def _start(self, child: _Child) -> None:
        service = child.service
        with open(child.log_path, "ab") as log:
            child.shown = log.tell()
            child.process = subprocess.Popen(
                list(service.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **service.environment},
                process_group=0,
                preexec_fn=die_with_parent(os.getpid()),
            )
        child.started_at = time.monotonic()
        child.healthy_since = None
        child.restart_at = None

    def _look_after_children(self, first_start: bool) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.restart_at is not None:
                if now >= child.restart_at:
                    self._start(child)
                continue
            assert child.process is not None
            code = child.process.poll()
            # The sentence of a refused configuration is shown once, at the end.
            if child.healthy_since is None and first_start and code != BAD_CONFIGURATION:
                self._show_new_lines(child)
            if code is not None:
                self._mourn(child, code, first_start, now)
            elif child.healthy_since is None:
                if _is_healthy(child.service):
                    child.healthy_since = now
                    if not first_start:
                        self._say(f"{child.service.name} is ready again.")
            elif child.deaths and now - child.healthy_since > FORGIVE_SECONDS:
                child.deaths = 0
            _rotate(child)

    def _mourn(self, child: _Child, code: int, first_start: bool, now: float) -> None:
        name = child.service.name
        assert child.process is not None
        _signal_group(child.process.pid, signal.SIGKILL)
        was_ready = child.healthy_since is not None
        child.healthy_since = None
        # Later on it is no fault of the configuration (a full disk, say): that passes.
        if code == BAD_CONFIGURATION and first_start and not was_ready:
            raise SupervisorError(
                _last_line(child.log_path).removeprefix(_FATAL)
                or f"{name} refused its configuration.",
                BAD_CONFIGURATION,
            )
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        if first_start and not was_ready and child.deaths >= 2:
            raise SupervisorError(
                f"{name} {how} three times while starting. Its log is {child.log_path}."
            )
        wait = BACKOFF_SECONDS[min(child.deaths, len(BACKOFF_SECONDS) - 1)]
        child.deaths += 1
        child.restart_at = now + wait
        self._say(f"{name} {how}; starting it again in {wait:g} s. Log: {child.log_path}")

    def _show_new_lines(self, child: _Child) -> None:
        with open(child.log_path, "rb") as log:
            log.seek(child.shown)
            new = log.read(64 * 1024)
        complete = new.rfind(b"\n") + 1
        child.shown += complete
        for line in new[:complete].decode("utf-8", "replace").splitlines():
            text = line.rsplit("\r", 1)[-1].rstrip()
            if text and not text.startswith(_FATAL):
                self._say(f"  {child.service.name:8} {text}")


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_healthy(service: Service) -> bool:
    if service.health is None:
        return True
    host, port, path = service.health
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(path: Path) -> str:
    with open(path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 8192))
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _rotate(child: _Child) -> None:
    """Move a large log aside. Children append, so a truncated file goes on from its start."""
    if child.log_path.stat().st_size > LOG_BYTES:
        old = child.log_path.with_suffix(".log.1")
        try:
            shutil.copyfile(child.log_path, old)
        except OSError:  # a full disk: the old lines are worth less than the room they take
            old.unlink(missing_ok=True)
        os.truncate(child.log_path, 0)
        child.shown = 0


def own_command(*arguments: str) -> list[str]:
    """The command line of a `lectern` subcommand run by this same interpreter."""
    return [sys.executable, "-m", "deploy.cli", *arguments]
