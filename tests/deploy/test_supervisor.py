"""The supervisor, with small real processes: start, restart, stop, and leave nothing behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.supervisor import (
    Service,
    Supervisor,
    SupervisorError,
    _Child,
    _rotate,
    lock_home,
    port_is_free,
)

SERVER = """
import http.server, os, pathlib, subprocess, sys
port, mark = int(sys.argv[1]), pathlib.Path(sys.argv[2])
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with mark.open("a") as f:
    f.write(f"{os.getpid()} {grandchild.pid}\\n")
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", port), H).serve_forever()
"""

RUNNER = """
import sys, pathlib
from deploy.supervisor import Service, Supervisor
port, mark, logs = sys.argv[1:]
service = Service("fake", [sys.executable, "-c", {server!r}, port, mark],
                  health=("127.0.0.1", int(port), "/"))
sys.exit(Supervisor([service], pathlib.Path(logs)).run(lambda: print("ready", flush=True)))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_in(mark: Path) -> list[list[int]]:
    if not mark.exists():
        return []
    return [[int(word) for word in line.split()] for line in mark.read_text().splitlines()]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    mark = tmp_path / "mark"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUNNER.format(server=SERVER),
            str(free_port()),
            str(mark),
            str(tmp_path / "logs"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process, mark
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in (pid for pids in pids_in(mark) for pid in pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_stop_ends_the_whole_process_group(
    supervisor: tuple[subprocess.Popen[str], Path],
) -> None:
    process, mark = supervisor
    (pids,) = pids_in(mark)
    assert all(is_running(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert not any(is_running(pid) for pid in pids)


def test_kill_9_of_the_supervisor_ends_its_child(
    supervisor: tuple[subprocess.Popen[str], Path],
) -> None:
    process, mark = supervisor
    ((child, grandchild),) = pids_in(mark)
    process.kill()
    process.wait()
    wait_for(lambda: not is_running(child))
    os.kill(grandchild, signal.SIGKILL)  # this one did not ask to die with its parent


def test_a_killed_child_is_started_again_and_said_so(
    supervisor: tuple[subprocess.Popen[str], Path],
) -> None:
    process, mark = supervisor
    ((child, old_grandchild),) = pids_in(mark)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: len(pids_in(mark)) == 2)
    assert process.stdout is not None
    assert "fake was ended by SIGKILL; starting it again" in process.stdout.readline()
    assert process.stdout.readline() == "fake is ready again.\n"
    assert not is_running(old_grandchild), "the old group is killed before a new one starts"


def start(tmp_path: Path, code: str) -> None:
    service = Service("fake", [sys.executable, "-c", textwrap.dedent(code)], health=None)
    said: list[str] = []
    # Never healthy: the port is closed.
    service = Service(service.name, service.command, health=("127.0.0.1", free_port(), "/"))
    Supervisor([service], tmp_path, said.append).run(lambda: None, start_seconds=20)


def test_bad_configuration_stops_with_the_child_s_sentence(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match="The folder /x is no model") as caught:
        start(tmp_path, "import sys; print('The folder /x is no model.'); sys.exit(2)")
    assert caught.value.exit_code == 2


def test_a_service_that_never_starts_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match="ended with code 1 three times while starting"):
        start(tmp_path, "raise SystemExit(1)")


def test_a_service_that_is_never_ready_is_named(tmp_path: Path) -> None:
    service = Service(
        "slow",
        [sys.executable, "-c", "import time; time.sleep(60)"],
        health=("127.0.0.1", free_port(), "/"),
    )
    with pytest.raises(SupervisorError, match="Not ready after 1 s: slow"):
        Supervisor([service], tmp_path, lambda _: None).run(lambda: None, start_seconds=1)


def test_one_supervisor_a_home(tmp_path: Path) -> None:
    with lock_home(tmp_path):
        with pytest.raises(SupervisorError, match=rf"already running .*process {os.getpid()}"):
            lock_home(tmp_path)
    lock_home(tmp_path).close()


def test_port_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not port_is_free("127.0.0.1", taken.getsockname()[1])
    assert port_is_free("127.0.0.1", free_port())


def test_the_sentence_of_a_refused_configuration_is_shown_once(tmp_path: Path) -> None:
    said: list[str] = []
    code = "import sys, time; print('lectern: No model.', flush=True); time.sleep(0.6); sys.exit(2)"
    service = Service("fake", [sys.executable, "-c", code], health=("127.0.0.1", free_port(), "/"))
    with pytest.raises(SupervisorError, match=r"^No model\.$"):
        Supervisor([service], tmp_path, said.append).run(lambda: None, start_seconds=20)
    assert said == []


def test_a_service_that_was_once_ready_is_never_given_up(tmp_path: Path) -> None:
    """Exit code 2 while the disk is full, say, must not take the other services down."""
    code = textwrap.dedent(
        """
        import pathlib, sys
        mark = pathlib.Path(sys.argv[1]); starts = mark.read_text() if mark.exists() else ""
        mark.write_text(starts + "x")
        if len(starts) == 1: sys.exit(2)
        if len(starts) == 0:
            import time; time.sleep(1); sys.exit(1)
        import time; time.sleep(60)
        """
    )
    said: list[str] = []
    service = Service("fake", [sys.executable, "-c", code, str(tmp_path / "mark")])

    def say(line: str) -> None:
        said.append(line)
        if said.count("fake is ready again.") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    supervisor = Supervisor([service], tmp_path / "logs", say)
    assert supervisor.run(lambda: None, start_seconds=20) == 0
    assert any("ended with code 2; starting it again" in line for line in said)


def test_an_address_of_another_machine_is_no_port_in_use() -> None:
    with pytest.raises(OSError, match="assign"):
        port_is_free("192.0.2.1", free_port())


def test_a_log_that_cannot_be_kept_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.supervisor.LOG_BYTES", 10)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    child = _Child(Service("fake", []), tmp_path / "fake.log")
    child.log_path.write_bytes(b"x" * 20)
    _rotate(child)
    assert [path.name for path in tmp_path.iterdir()] == ["fake.log"]
    assert child.log_path.stat().st_size == 0
