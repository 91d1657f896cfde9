"""The database schema: migrate it, check it. Migrations are part of the package."""

import sqlite3
from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DatabaseError, OperationalError

import backend.accounts.models
import backend.conversations.models
import backend.courses.models
import backend.documents.models
import backend.keys.models
import backend.usage.models  # noqa: F401  # every table is known to Base.metadata from here on
from backend.database import Base, Database
from backend.errors import DISK_FULL, StartupError

metadata = Base.metadata


def alembic_config(database: Database) -> Config:
    """Alembic's configuration without an ini file; env.py takes the engine from it."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["database"] = database
    return config


def head() -> str:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config).get_current_head() or ""


def revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _is_known(name: str) -> bool:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return any(s.revision == name for s in ScriptDirectory.from_config(config).walk_revisions())


def check(database: Database) -> None:
    """Raise StartupError unless the schema is exactly the one this version was written for."""
    current = _current(database)
    if current is None:
        raise StartupError("The database is empty. Run `lectern prepare` first.")
    if current != head():
        raise StartupError("The database is from an older version. Run `lectern prepare` first.")


def migrate(database: Database) -> None:
    """Bring the schema to this version; raises StartupError for one that is newer."""
    if _current(database) != head():
        try:
            alembic.command.upgrade(alembic_config(database), "head")
        except OperationalError as error:
            raise StartupError(explain(database, error)) from error


def _current(database: Database) -> str | None:
    try:
        current = revision(database)
    except DatabaseError as error:
        raise StartupError(explain(database, error)) from error
    if current is not None and not _is_known(current):
        raise StartupError(
            "The database was made by a newer version of Lectern. Install that version, or name "
            "another database in LECTERN_DATABASE_URL."
        )
    return current


def explain(database: Database, error: DatabaseError) -> str:
    """One sentence about a database that cannot be used; never its password."""
    original = error.orig
    where = database.url.render_as_string(hide_password=True)
    if isinstance(original, sqlite3.OperationalError) and "full" in str(original):
        return DISK_FULL
    if isinstance(original, sqlite3.Error):
        return f"The database {database.url.database} cannot be used: {original}."
    reason = " ".join(str(original).split())[:300]
    return (
        f"The database at {where} cannot be reached: {reason}. Check LECTERN_DATABASE_URL and that "
        "the server runs."
    )
