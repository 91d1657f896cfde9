"""The commands: prepare, backend, worker, user; and faults that are one sentence."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select

from backend.accounts.models import User
from backend.courses.models import Course, Enrolment
from backend.database import Database
from backend.documents.models import Document
from backend.errors import StartupError
from backend.prepare import make_home, prepare
from backend.settings import Settings, load_settings
from tests.backend.world import wait_for

ROOT = Path(__file__).parents[2]


def lectern(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=ROOT,
        env=environment(home) | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def environment(home: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("LECTERN_")}
    return keep | {
        "LECTERN_HOME": str(home),
        "LECTERN_ARGON2_MEMORY_KIB": "256",
        "LECTERN_ARGON2_ROUNDS": "1",
        "LECTERN_UPSTREAM_URL": "http://127.0.0.1:1",
        "LECTERN_EMBEDDER": "hashing",
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home made by the command; tests below only read it or add accounts to it."""
    home = tmp_path_factory.mktemp("prepared") / "home"
    done = lectern(home, "prepare")
    assert done.returncode == 0, done.stderr
    login = home / "initial-login"
    # Not a terminal: the path is shown, the content is not.
    assert str(login) in done.stdout
    for password in re.findall(r"^\w+ +(\S+)$", login.read_text(), re.MULTILINE):
        assert password not in done.stdout + done.stderr
    return home


def test_prepared_home(prepared: Path) -> None:
    assert stat.S_IMODE(prepared.stat().st_mode) == 0o700
    assert stat.S_IMODE((prepared / "initial-login").stat().st_mode) == 0o600
    assert stat.S_IMODE((prepared / "lectern.db").stat().st_mode) == 0o600
    database = Database(f"sqlite:///{prepared / 'lectern.db'}")
    with database.read() as session:
        users = {user.username: user for user in session.execute(select(User)).scalars()}
        course = session.execute(select(Course)).scalar_one()
        members = session.execute(select(func.count()).select_from(Enrolment)).scalar_one()
        documents = session.execute(select(Document)).scalars().all()
    database.close()
    assert {"admin", "teacher", "student"} <= set(users)
    assert all(user.must_change_password for user in users.values())
    assert course.slug == "compilers"
    assert members == 2
    assert len(documents) >= 12
    assert {document.state for document in documents} == {"queued"}


def test_prepare_twice_changes_nothing(prepared: Path) -> None:
    before = (prepared / "initial-login").read_text()
    again = lectern(prepared, "prepare")
    assert again.returncode == 0
    assert (prepared / "initial-login").read_text() == before
    database = Database(f"sqlite:///{prepared / 'lectern.db'}")
    with database.read() as session:
        assert session.execute(select(func.count()).select_from(Course)).scalar_one() == 1
    database.close()


def test_user_commands(prepared: Path) -> None:
    added = lectern(prepared, "user", "add", "ada", "--role", "teacher")
    assert added.returncode == 0, added.stderr
    assert re.search(r"ada: \S{4}-\S{4}-\S{4}-\S{4}", added.stdout)
    twice = lectern(prepared, "user", "add", "ada")
    assert (twice.returncode, twice.stderr.count("\n")) == (2, 1)
    reset = lectern(prepared, "user", "reset", "ada")
    assert reset.returncode == 0
    assert reset.stdout != added.stdout
    assert lectern(prepared, "user", "disable", "ada").returncode == 0
    missing = lectern(prepared, "user", "reset", "nobody")
    assert (missing.returncode, missing.stderr) == (2, "There is no user called nobody.\n")


def test_backend_command_from_first_login_to_stop(prepared: Path, free_port: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "backend", "--port", str(free_port)],
        cwd=ROOT,
        env=environment(prepared),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{free_port}"
        client = httpx2.Client(base_url=url, timeout=10, trust_env=False)

        def up() -> bool:
            try:
                return client.get("/health").status_code == 200
            except httpx2.HTTPError:
                return False

        wait_for(up, 60)
        second = lectern(prepared, "backend", "--port", str(free_port))
        assert second.returncode == 2
        assert "--port" in second.stderr
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            other_port = str(sock.getsockname()[1])
        elsewhere = lectern(prepared, "backend", "--port", other_port)
        assert elsewhere.returncode == 2
        assert "Another backend is running" in elsewhere.stderr
        login = prepared / "initial-login"
        password = re.findall(r"^admin +(\S+)$", login.read_text(), re.MULTILINE)[0]
        body = {"username": "admin", "password": password}
        token = client.post("/api/auth/login", json=body).json()["token"]
        new = {"current_password": password, "new_password": "a long new password"}
        changed = client.post(
            "/api/auth/password", json=new, headers={"cookie": f"lectern_session={token}"}
        )
        assert changed.status_code == 200
        assert not login.exists()
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    for secret in (password, token, "a long new password"):
        assert secret not in err


def test_worker_command_stops_on_sigterm(prepared: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "worker"],
        cwd=ROOT,
        env=environment(prepared),
        stderr=subprocess.PIPE,
        text=True,
    )
    database = Database(f"sqlite:///{prepared / 'lectern.db'}")

    def begun() -> bool:
        with database.read() as session:
            states = session.execute(select(Document.state)).scalars().all()
        return "indexing" in states

    wait_for(begun, 60)
    database.close()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=180)  # it ends the piece of work it is at, on a busy machine too
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LECTERN_UPSTREAM_URL", "not a url"),
        ("LECTERN_DATABASE_URL", "mysql://x"),
        ("LECTERN_SESSION_HOURS", "-1"),
        ("LECTERN_DATABASE_URL", "postgresql://me:hunter2@127.0.0.1:1/x"),
        ("LECTERN_UPSTREAM_KEY_FILE", "/does/not/exist"),
    ],
)
def test_bad_settings_are_one_sentence(prepared: Path, variable: str, value: str) -> None:
    done = lectern(prepared, "backend", **{variable: value})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert variable in done.stderr
    assert "hunter2" not in done.stderr


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = lectern(tmp_path / "file" / "home", "prepare")
    assert done.returncode == 2
    assert "LECTERN_HOME" in done.stderr
    assert done.stderr.count("\n") == 1


def test_full_disk_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StartupError, match="is full"):
        make_home(tmp_path / "home")


def test_backend_without_prepare(tmp_path: Path, free_port: int) -> None:
    done = lectern(tmp_path, "backend", "--port", str(free_port))
    assert (done.returncode, done.stderr) == (
        2,
        "The database is empty. Run `lectern prepare` first.\n",
    )


def test_prepare_on_postgresql(postgres: str, url: str, tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path / "home", database_url=url, argon2_memory_kib=256, argon2_rounds=1
    )
    done = prepare(settings)
    assert done.initial_login is not None
    assert prepare(settings).initial_login == done.initial_login


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LECTERN_UPSTREAM_URL", "http://engine:8000/v1/")
    monkeypatch.setenv("LECTERN_UPSTREAM_KEY", "k")
    monkeypatch.setenv("LECTERN_DATABASE_URL", "postgres://me@host/name")
    settings = load_settings()
    assert settings.upstream_url == "http://engine:8000"
    assert settings.read_upstream_key() == "k"
    assert settings.database == "postgresql+psycopg://me@host/name"
    assert "'k'" not in repr(settings)


def test_ports_are_checked_before_anything_else() -> None:
    from backend.cli import listen

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match="--port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(StartupError, match="--host"):
        listen("no.such.host.invalid", 0)


def test_shared_directories_are_left_alone() -> None:
    mode = Path("/tmp").stat().st_mode
    with pytest.raises(StartupError, match="directory inside it"):
        make_home(Path("/tmp"))
    assert Path("/tmp").stat().st_mode == mode
