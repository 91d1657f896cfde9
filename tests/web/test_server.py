"""Starting and stopping the web application as a process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.web.serving_pages import free_port, wait_until_up
from web.settings import streamlit_options

ROOT = Path(__file__).parents[2]


def _web(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "web", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_one_sentence_and_code_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _web("--port", str(port))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"Port {port} on 127.0.0.1 is in use; stop the program that has it or choose another "
        "with --port."
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--backend-url", "nowhere"], "--backend-url must be an http or https URL"),
        (["--host", "203.0.113.7"], "Cannot listen on 203.0.113.7"),
    ],
)
def test_bad_options_are_one_sentence_and_code_2(options: list[str], sentence: str) -> None:
    done = _web("--port", str(free_port()), *options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_is_a_graceful_stop(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "web", "--port", str(port)], cwd=ROOT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/_stcore/health", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


def test_streamlit_is_told_to_keep_to_itself() -> None:
    from streamlit import config

    options = streamlit_options("127.0.0.1", 8501)
    known = set(config.get_config_options())
    assert set(options) <= known
    assert options["browser.gatherUsageStats"] is False
    assert options["server.enableXsrfProtection"] is True
    assert options["client.showErrorDetails"] == "none"
    assert options["server.address"] == "127.0.0.1"
    assert not any("http" in str(value) for value in options.values())
