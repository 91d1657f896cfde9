"""The `lectern` command: what it lists, what it loads, and what it says on bad input."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import up
from deploy.cli import SUBCOMMANDS

ROOT = Path(__file__).parents[2]


def lectern(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_subcommand_without_loading_one() -> None:
    done = lectern("--help")
    assert done.returncode == 0
    for name in SUBCOMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(SUBCOMMANDS))
def test_every_subcommand_explains_itself(name: str) -> None:
    done = lectern(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: lectern " + name in done.stdout


def test_an_unknown_subcommand_gets_a_suggestion() -> None:
    done = lectern("serv")
    assert done.returncode == 2
    assert "Did you mean" in done.stderr


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("serve", {"backend", "rag", "web", "sqlalchemy", "streamlit"}),
        ("web", {"backend", "rag", "serving", "torch", "sqlalchemy"}),
        ("user", {"serving", "web", "torch", "streamlit"}),
        ("up", {"serving", "web", "backend", "rag", "torch"}),
    ],
)
def test_a_subcommand_loads_only_its_own_part(name: str, others: set[str]) -> None:
    code = (
        "import sys; from deploy.cli import build; build(sys.argv[1]);"
        "print(' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not others & set(done.stdout.split())


def test_up_says_which_port_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = lectern("up", "--home", str(tmp_path), "--web-port", port)
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--web-port" in done.stderr


def test_up_refuses_one_port_for_two(tmp_path: Path) -> None:
    done = lectern("up", "--home", str(tmp_path), "--web-port", "9999", "--backend-port", "9999")
    assert done.returncode == 2
    assert "asked for twice" in done.stderr


def test_up_refuses_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    done = lectern("up", "--home", str(file / "below"))
    assert done.returncode == 2
    assert "state directory" in done.stderr


def test_up_refuses_an_upstream_that_is_no_address(tmp_path: Path) -> None:
    done = lectern("up", "--home", str(tmp_path), "--upstream", "localhost")
    assert done.returncode == 2
    assert "--upstream localhost is not an address" in done.stderr


def test_the_demo_runs_on_cores_and_models_of_ones_own_where_there_is_room() -> None:
    def layout(*arguments: Any) -> dict[str, str]:
        words = up._layout(*arguments)
        return dict(zip(words[::2], words[1::2], strict=True))

    stages, ranks, device = "--pipeline-parallel-size", "--tensor-parallel-size", "--device"
    assert layout("demo", 0, 1, "auto") == {stages: "2", ranks: "1", device: "cpu"}
    assert layout("demo", 1, 1, "cuda") == {stages: "1", ranks: "1", device: "cuda"}
    assert layout("/models/x", 0, 1, "auto") == {stages: "1", ranks: "1", device: "auto"}
    assert layout("/models/x", 4, 2, "auto") == {stages: "4", ranks: "2", device: "auto"}


def test_the_order_of_service_is_passed_on_only_when_it_is_chosen() -> None:
    assert up._service("", 0) == []
    assert up._service("slo", 30) == ["--order", "slo", "--max-predicted-ttft", "30"]
    refused = lectern("serve", "/nowhere", "--port", "0", *up._service("random", 0.5))
    assert refused.returncode == 2
    assert "--order" in refused.stderr
