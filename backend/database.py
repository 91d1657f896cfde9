"""The database: one declarative base, short transactions, SQLite and PostgreSQL alike.

Invariants
- On SQLite every writer begins with BEGIN IMMEDIATE, so it waits at the door and never fails
  half-way through with "database is locked" when a read turns into a write.
- Writers of one process queue on a lock; only processes compete for SQLite's own lock.
- No transaction is open while a model answers: callers open one, finish it, and go on.
- Errors never carry the values of a statement (hide_parameters): they end up in logs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio
from sqlalchemy import DateTime, Engine, MetaData, create_engine, event, make_url, text
from sqlalchemy.engine import URL, Connection, Dialect
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from backend.errors import StartupError

T = TypeVar("T")
_BUSY_MILLISECONDS = 20_000
_WORKER_THREADS = 24


def utcnow() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on both databases; SQLite keeps no zone of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Database:
    """An engine and the two ways into it: `read()` and `write()`."""

    def __init__(self, url: str) -> None:
        self.url = _parse(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgres_engine(self.url)
        self._readers = self.engine.execution_options(
            **({} if self.is_sqlite else {"postgresql_readonly": True})
        )
        self._writers = self.engine.execution_options(lectern_write=True)
        self._write_lock = threading.Lock() if self.is_sqlite else None
        self._writing = threading.local()
        self._limiter: anyio.CapacityLimiter | None = None

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._readers, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block and rolls back on any exception."""
        if getattr(self._writing, "active", False):
            raise RuntimeError("a write transaction is already open in this thread")
        if self._write_lock is not None:
            self._write_lock.acquire()
        self._writing.active = True
        try:
            with Session(self._writers, expire_on_commit=False) as session, session.begin():
                yield session
        finally:
            self._writing.active = False
            if self._write_lock is not None:
                self._write_lock.release()

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking database work in a bounded set of threads, for asynchronous callers."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_WORKER_THREADS)
        return await anyio.to_thread.run_sync(work, *args, limiter=self._limiter)

    def ping(self) -> None:
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StartupError(
            "LECTERN_DATABASE_URL is not a database URL. Use sqlite:////path/to/lectern.db or "
            "postgresql://user@host/name."
        ) from error
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StartupError(
            f"LECTERN_DATABASE_URL names {backend}, which is not supported. Use SQLite or "
            "PostgreSQL."
        )
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StartupError(
            "LECTERN_DATABASE_URL names a SQLite database in memory, which the index worker "
            "cannot share. Name a file."
        )
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, pool_size=8, max_overflow=56, pool_timeout=30, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin where _begin says, nowhere else
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("lectern_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> Engine:
    from psycopg.types.string import StrDumperUnknown

    class WithoutNul(StrDumperUnknown):
        """PostgreSQL stores no NUL, and people, documents and models all can send one."""

        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\ufffd"))

    engine = create_engine(
        url, pool_size=8, max_overflow=24, pool_timeout=30, pool_pre_ping=True, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: ConnectionPoolEntry) -> None:
        connection.adapters.register_dumper(str, WithoutNul)

    return engine
