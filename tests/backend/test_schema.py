"""Migrations on both databases: up, down, up; nothing for autogenerate to add."""

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text

from backend import schema
from backend.courses.models import Course
from backend.database import Database
from backend.errors import StartupError
from backend.keys.models import ApiKey
from backend.settings import Settings


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_up_down_up(empty_url: str) -> None:
    database = Database(empty_url)
    with pytest.raises(StartupError, match="lectern prepare"):
        schema.check(database)
    schema.migrate(database)
    schema.check(database)
    assert tables(database) == set(schema.metadata.tables)
    alembic.command.downgrade(schema.alembic_config(database), "base")
    assert tables(database) == set()
    schema.migrate(database)
    schema.migrate(database)  # twice is once
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    database.close()


def test_keys_of_an_older_database_become_standard_and_nothing_is_lost(empty_url: str) -> None:
    database = Database(empty_url)
    alembic.command.upgrade(schema.alembic_config(database), "0001")
    with database.write() as session:
        for statement in (
            "INSERT INTO users (id, username, display_name, role, password_hash, "
            "must_change_password, active, created_at) VALUES (1, 'a', 'A', 'student', 'x', "
            "false, true, CURRENT_TIMESTAMP)",
            "INSERT INTO api_keys (id, user_id, name, key_hash, prefix, last4, created_at) "
            "VALUES (7, 1, 'k', 'h', 'sk-', 'abcd', CURRENT_TIMESTAMP)",
            "INSERT INTO usage_records (id, user_id, key_id, day, source, model, prompt_tokens, "
            "completion_tokens, estimated, status, created_at) VALUES (1, 1, 7, CURRENT_DATE, "
            "'gateway', 'm', 3, 4, false, 'complete', CURRENT_TIMESTAMP)",
        ):
            session.execute(text(statement))
    with pytest.raises(StartupError, match="older version"):
        schema.check(database)
    schema.migrate(database)
    schema.check(database)
    with database.read() as session:
        [key] = session.execute(select(ApiKey)).scalars()
        assert (key.id, key.name, key.service_class) == (7, "k", "standard")
    alembic.command.downgrade(schema.alembic_config(database), "0001")
    with database.read() as session:
        kept = session.execute(text("SELECT key_id FROM usage_records")).scalar_one()
    assert kept == 7
    assert "service_class" not in {
        column["name"] for column in inspect(database.engine).get_columns("api_keys")
    }
    database.close()


def test_newer_schema_is_refused(url: str) -> None:
    database = Database(url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (schema.check, schema.migrate):
        with pytest.raises(StartupError, match="newer version"):
            use(database)
    database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(StartupError, match="LECTERN_DATABASE_URL"):
        Database(url)


def test_passwords_of_the_database_are_not_shown() -> None:
    url = Settings(database_url="postgresql://me:hunter2@127.0.0.1:1/x").database
    database = Database(url)
    with pytest.raises(StartupError) as failed:
        schema.check(database)
    assert "hunter2" not in str(failed.value)
    assert "127.0.0.1" in str(failed.value)


def test_sqlite_is_set_up_for_many_writers(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as session:
        pragmas = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
    assert pragmas == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "busy_timeout": 20_000,
        "synchronous": 1,
    }
    database.close()


def test_nested_writes_are_a_fault_and_not_a_deadlock(database: Database) -> None:
    with pytest.raises(RuntimeError, match="already open"), database.write(), database.write():
        pass
    with database.write():
        pass


def test_nul_can_be_stored_everywhere(database: Database) -> None:
    with database.write() as session:
        session.add(Course(slug="nul", name="a\0b"))
    with database.read() as session:
        name = session.execute(select(Course.name).where(Course.slug == "nul")).scalar_one()
    assert name in ("a\0b", "a\ufffdb")
