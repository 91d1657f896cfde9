"""First start: state directory, database, first accounts, sample course. Twice is harmless."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select

from backend import schema
from backend.accounts.models import Role, User
from backend.accounts.passwords import Passwords, one_time_password
from backend.courses.models import Course, Enrolment
from backend.database import Database
from backend.documents import service as documents
from backend.documents.storage import DocumentStorage
from backend.errors import DISK_FULL, StartupError, is_disk_full
from backend.settings import Settings

SAMPLE_SLUG = "compilers"
_SHARED = frozenset(map(Path, ("/", "/tmp", "/var/tmp", "/home", "/root", "/var", "/etc", "/usr")))
_FIRST: tuple[tuple[str, str, Role], ...] = (
    ("admin", "Administrator", "administrator"),
    ("teacher", "Teacher", "teacher"),
    ("student", "Student", "student"),
)


@dataclass(frozen=True)
class Prepared:
    home: Path
    initial_login: Path | None  # None when no first passwords are waiting


def make_home(home: Path) -> None:
    """Create the state directory for this user only; raises StartupError when that fails."""
    os.umask(0o077)
    # The folder is closed to everybody else, which must not happen to a shared one.
    if home in _SHARED:
        raise StartupError(
            f"{home} holds more than Lectern's state. Set LECTERN_HOME to a directory inside it."
        )
    try:
        for folder in (home, home / "documents", home / "index", home / "logs", home / "run"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.chmod(0o700)
        probe = home / f".probe-{os.getpid()}"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        if is_disk_full(error):
            raise StartupError(
                f"The disk that holds {home} is full. Free some space or set LECTERN_HOME to a "
                "directory on another disk."
            ) from error
        raise StartupError(
            f"The state directory {home} cannot be written ({error.strerror}). Set LECTERN_HOME to "
            "a directory you own."
        ) from error


def prepare(settings: Settings) -> Prepared:
    make_home(settings.home)
    database = Database(settings.database)
    try:
        schema.migrate(database)
        passwords = Passwords(settings.argon2_memory_kib, settings.argon2_rounds)
        _first_accounts(database, passwords, settings.initial_login)
        _sample_course(database, DocumentStorage(settings.documents_dir), settings)
    except OSError as error:
        if is_disk_full(error):
            raise StartupError(DISK_FULL) from error
        raise
    finally:
        database.close()
    waiting = settings.initial_login if settings.initial_login.exists() else None
    return Prepared(settings.home, waiting)


def _first_accounts(database: Database, passwords: Passwords, path: Path) -> None:
    """On a database without users: make three, and write their passwords for the owner's eyes."""
    with database.read() as session:
        if session.execute(select(func.count()).select_from(User)).scalar_one():
            return
    made = [(name, shown, role, one_time_password()) for name, shown, role in _FIRST]
    hashes = [passwords.hash(password) for *_, password in made]
    lines = [
        "First logins of Lectern. Each password must be changed at the first login.",
        "This file is removed once the administrator has done so.",
        "",
        *(f"{name:<10} {password}" for name, _, _, password in made),
        "",
    ]
    # The file comes first: a crash in between leaves passwords without accounts, and the next
    # start makes new ones; the other way round nobody could sign in.
    _write_secret(path, "\n".join(lines))
    with database.write() as session:
        session.add_all(
            User(username=name, display_name=shown, role=role, password_hash=hashed)
            for (name, shown, role, _), hashed in zip(made, hashes, strict=True)
        )


def _write_secret(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _sample_course(database: Database, storage: DocumentStorage, settings: Settings) -> None:
    from rag.sample import sample_course_folder

    folder = sample_course_folder()
    about = tomllib.loads((folder / "course.toml").read_text(encoding="utf-8"))
    name = " · ".join(about["name"].values())  # one name in each language
    with database.write() as session:
        course = session.execute(
            select(Course).where(Course.slug == SAMPLE_SLUG)
        ).scalar_one_or_none()
        if course is not None:
            return
        course = Course(slug=SAMPLE_SLUG, name=name[:200])
        session.add(course)
        session.flush()
        for username, role in (("teacher", "teacher"), ("student", "student")):
            user = session.execute(
                select(User).where(User.username == username)
            ).scalar_one_or_none()
            if user is not None:
                session.add(Enrolment(course_id=course.id, user_id=user.id, role=role))
    root = folder / "documents"
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with path.open("rb") as source:
            documents.accept(
                database,
                storage,
                course.id,
                None,
                path.relative_to(root).as_posix(),
                source,
                settings.max_upload_bytes,
            )
