"""The backend's subcommands: prepare, backend, worker, user."""

import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

import typer

from backend.errors import ApiError, StartupError

Result = TypeVar("Result")
_GRACE_SECONDS = 5
#: How soon the worker's main thread looks whether a signal came.
_SIGNAL_SECONDS = 0.2


def _sentences(command: Callable[..., Result]) -> Callable[..., Result]:
    """A configuration fault becomes one sentence on stderr and exit code 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Result:
        try:
            return command(*args, **kwargs)
        except StartupError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from error
        except ApiError as error:
            typer.echo(error.message, err=True)
            raise typer.Exit(2) from error

    return run


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything else starts; raises StartupError with what to do about it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartupError(f"--host {host} is not an address of this machine.") from error
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise StartupError(
            f"Port {port} on {host} cannot be used ({error.strerror}). Stop the program that uses "
            "it or choose another with --port."
        ) from error
    return sock


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold a lock for the life of the backend: two on one home would end each other's answers."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file: IO[str] = path.open("a+", encoding="ascii")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartupError(
                f"Another backend is running on {path.parent.parent}. Stop it, or set LECTERN_HOME "
                "to another directory."
            ) from error
        yield
    finally:
        file.close()


@_sentences
def prepare() -> None:
    """Create the state directory, the database, the first accounts and the sample course."""
    from backend.prepare import prepare as do_prepare
    from backend.settings import load_settings

    done = do_prepare(load_settings())
    typer.echo(f"State directory: {done.home}")
    if done.initial_login is None:
        return
    if sys.stdout.isatty():
        typer.echo(done.initial_login.read_text(encoding="utf-8"))
    else:
        typer.echo(f"First logins: {done.initial_login}")


@_sentences
def backend(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
) -> None:
    """Start the backend: accounts, courses, keys, the /v1 gateway."""
    from backend import logs, schema
    from backend.database import Database
    from backend.prepare import make_home
    from backend.settings import load_settings

    settings = load_settings()
    logs.configure()
    make_home(settings.home)
    settings.read_upstream_key()
    sock = listen(host, port)
    with only_one(settings.home / "run" / "backend.lock"):
        database = Database(settings.database)
        try:
            schema.check(database)
        finally:
            database.close()
        import uvicorn

        from backend.app import create_app

        config = uvicorn.Config(
            create_app(settings),
            log_level="warning",
            access_log=False,
            loop="auto",
            http="httptools",
            lifespan="on",
            proxy_headers=False,  # X-Forwarded-For counts for logins only, and only from our own
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        server = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            # After its graceful stop uvicorn raises the signal once more; that is no crash.
            signal.signal(number, lambda *_: None)
        server.run(sockets=[sock])
        if not server.started:
            raise typer.Exit(1)


@_sentences
def worker() -> None:
    """Start the worker that parses and indexes documents."""
    from backend import logs, schema
    from backend.database import Database
    from backend.documents.parsing import ChildParser
    from backend.documents.rag_retrieval import RagRetrieval
    from backend.documents.storage import DocumentStorage
    from backend.documents.worker import Worker
    from backend.prepare import make_home
    from backend.settings import load_settings

    settings = load_settings()
    logs.configure()
    make_home(settings.home)
    database = Database(settings.database)
    schema.check(database)
    stop = threading.Event()
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # No lock may be taken here: the main thread may hold it.
        signal.signal(number, lambda number, _: signals.append(number))
    running = Worker(
        database,
        DocumentStorage(settings.documents_dir),
        RagRetrieval(settings.embedder, settings.glossary),
        ChildParser(settings.parse_seconds, settings.parse_bytes),
        settings.index_dir,
        lease_seconds=settings.job_lease_seconds,
        attempts=settings.job_attempts,
    )
    crashed = threading.Event()

    def work() -> None:
        try:
            running.run(stop)
        except BaseException:
            crashed.set()  # the supervisor starts another worker; this one would only sit there
            raise

    thread = threading.Thread(target=work, name="worker", daemon=True)
    thread.start()
    # Never without an end: a signal that another thread takes does not wake this one.
    while thread.is_alive() and not signals:
        thread.join(timeout=_SIGNAL_SECONDS)
    stop.set()
    # A short job is finished; a long one goes to the next worker.
    thread.join(timeout=_GRACE_SECONDS)
    if thread.is_alive():
        running.give_back()
    os._exit(1 if crashed.is_set() else 0)


@contextmanager
def _accounts() -> Iterator[tuple[Any, Any]]:
    from backend import schema
    from backend.accounts.passwords import Passwords
    from backend.database import Database
    from backend.settings import load_settings

    settings = load_settings()
    database = Database(settings.database)
    try:
        schema.check(database)
        yield database, Passwords(settings.argon2_memory_kib, settings.argon2_rounds)
    finally:
        database.close()


def _user_id(database: Any, username: str) -> int:
    from backend.accounts import service

    with database.read() as session:
        user = service.find(session, username)
    if user is None:
        raise StartupError(f"There is no user called {username}.")
    return user.id


@_sentences
def user_add(
    username: str,
    role: Annotated[
        Literal["student", "teacher", "administrator"], typer.Option(help="Role of the account.")
    ] = "student",
    name: Annotated[str, typer.Option(help="Name to show; the user name if not given.")] = "",
) -> None:
    """Add an account and print its one-time password."""
    import re

    from backend.accounts import service
    from backend.accounts.schemas import USERNAME_PATTERN

    if not re.fullmatch(USERNAME_PATTERN, username):
        raise StartupError(
            "A user name has 1 to 64 letters, digits, dots, dashes, underscores or @ signs."
        )
    with _accounts() as (database, passwords):
        _, password = service.create_user(database, passwords, username, name, role)
    typer.echo(f"One-time password of {username}: {password}")


@_sentences
def user_reset(username: str) -> None:
    """Give an account a one-time password and end its sessions."""
    from backend.accounts import service

    with _accounts() as (database, passwords):
        password = service.reset_password(database, passwords, _user_id(database, username))
    typer.echo(f"One-time password of {username}: {password}")


@_sentences
def user_disable(username: str) -> None:
    """Deactivate an account: its sessions, running answers and keys end within seconds."""
    from backend.accounts import service
    from backend.accounts.schemas import UserChange

    with _accounts() as (database, _):
        service.change_user(database, _user_id(database, username), UserChange(active=False))
    typer.echo(f"{username} is deactivated.")


def register(app: typer.Typer) -> None:
    app.command("prepare")(prepare)
    app.command("backend")(backend)
    app.command("worker")(worker)
    user = typer.Typer(no_args_is_help=True, help="Add, reset or disable an account.")
    user.command("add")(user_add)
    user.command("reset")(user_reset)
    user.command("disable")(user_disable)
    app.add_typer(user, name="user")
