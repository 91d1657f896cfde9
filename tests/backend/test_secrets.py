"""No password, key, token or question is ever in a log or an error."""

import io
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from backend import logs
from backend.database import Database
from tests.backend.upstream import FakeUpstream
from tests.backend.world import PASSWORD, World


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Everything any logger of this process writes, at the lowest level."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(logging.DEBUG)
    root = logging.getLogger()
    handler = logging.StreamHandler(stream)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()


def test_secrets_never_reach_the_logs(
    logged: io.StringIO, world: World, fake: FakeUpstream
) -> None:
    client = world.client()
    body = {"username": "student", "password": PASSWORD}
    token = client.post("/api/auth/login", json=body).json()["token"]
    client.post("/api/auth/login", json=body | {"password": "wrong horse battery"})
    client.headers["cookie"] = f"lectern_session={token}"
    key = client.post("/api/keys", json={"name": "k"}).json()["key"]
    bearer = {"authorization": f"Bearer {key}"}
    question = {"model": "demo", "messages": [{"role": "user", "content": "my private question"}]}
    client.post("/v1/chat/completions", json=question, headers=bearer)
    fake.error = (500, {"error": {"message": "engine says my private question"}})
    client.post("/v1/chat/completions", json=question, headers=bearer)
    fake.error = None
    base = f"/api/courses/{world.course.id}"
    path = client.post(f"{base}/conversations", json={}).json()["id"]
    client.post(f"/api/conversations/{path}/messages", json={"content": "my private question"})
    client.get(f"{base}/search", params={"q": "my private question"})
    answers = [
        client.post("/api/auth/password", json={"current_password": PASSWORD}),
        client.post("/api/auth/login", json={"username": 1, "password": [PASSWORD]}),
    ]
    made = world.client("admin").post("/api/users", json={"username": "n", "role": "student"})
    text = logged.getvalue()
    assert "/api/auth/login" in text  # something was logged
    for secret in (
        PASSWORD,
        "wrong horse battery",
        token,
        key,
        made.json()["one_time_password"],
        "my private question",
        world.course.salt,
    ):
        assert secret not in text
        assert all(secret not in answer.text for answer in answers)


def test_fields_that_sound_secret_are_hidden(logged: io.StringIO) -> None:
    structlog.get_logger("x").info("said", new_password="hunter2", api_key="sk-1", job=3)
    assert "hunter2" not in logged.getvalue()
    assert "sk-1" not in logged.getvalue()
    assert "said" in logged.getvalue()


def test_a_failed_statement_does_not_log_its_values(database: Database) -> None:
    statement = text("INSERT INTO nowhere VALUES (:question)")
    with database.read() as session, pytest.raises(DatabaseError) as caught:
        session.execute(statement, {"question": "my private question"})
    assert "my private question" not in str(caught.value)


def test_a_full_disk_costs_a_log_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    logs.configure()
    try:
        structlog.get_logger("x").error("the disk is full")
    finally:
        structlog.reset_defaults()
