"""People, courses and a small search engine for tests."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from backend.accounts import sessions
from backend.accounts.models import User
from backend.accounts.passwords import Passwords
from backend.courses.models import Course, Enrolment
from backend.database import Database
from backend.documents.parsing import ParsedDocument, ParsedPassage, ParseError
from backend.documents.retrieval import Hit, IndexPassage, IndexUnusable, Progress
from backend.documents.storage import DocumentStorage
from backend.documents.worker import Worker
from backend.keys import service as keys
from backend.settings import Settings

PASSWORD = "correct horse battery"


class FakeRetrieval:
    """Counts common words. Generations are files, swapped in by rename like the real ones."""

    def warm_up(self) -> None:
        pass

    def build(self, folder: Path, passages: Sequence[IndexPassage], progress: Progress) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, passage in enumerate(passages, start=1):
            rows.append([passage.id, passage.text.lower().split()])
            progress(number, len(passages))
        aside = folder / "aside.json"
        aside.write_text(json.dumps(rows))
        aside.replace(folder / "index.json")

    def open(self, folder: Path) -> "FakeIndex":
        if not (folder / "index.json").exists():
            raise IndexUnusable("There is no index; index the course again.")
        return FakeIndex(json.loads((folder / "index.json").read_text()))


class FakeIndex:
    def __init__(self, rows: list[tuple[int, list[str]]]) -> None:
        self._rows = rows

    def search(self, query: str, k: int) -> list[Hit]:
        words = set(query.lower().split())
        scored = [Hit(number, float(len(words & set(text)))) for number, text in self._rows]
        return sorted((hit for hit in scored if hit.score), key=lambda hit: -hit.score)[:k]


def parse_lines(source: Path, name: str) -> ParsedDocument:
    """Every line a passage."""
    if not name.endswith(".txt"):
        raise ParseError(f"{name} is of a kind that cannot be read.")
    text = source.read_bytes().decode()
    if not text.strip():
        raise ParseError(f"{name} is empty; there is nothing to search.")
    passages, place = [], 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            passages.append(ParsedPassage(line.strip(), ["Notes"], 1, place, place + len(line)))
        place += len(line)
    return ParsedDocument(name.removesuffix(".txt").title(), text, passages)


@dataclass
class World:
    """`client(name)` speaks as a person: admin, teacher, student, stranger (of another course)."""

    settings: Settings
    url: str
    database: Database
    users: dict[str, User]
    course: Course
    other_course: Course
    _clients: list[httpx2.Client] = field(default_factory=list)

    def client(self, name: str | None = None) -> httpx2.Client:
        cookies = {"lectern_session": self.token(name)} if name else {}
        made = httpx2.Client(base_url=self.url, cookies=cookies, timeout=30, trust_env=False)
        self._clients.append(made)
        return made

    def token(self, name: str) -> str:
        with self.database.write() as session:
            return sessions.start(session, self.users[name].id, 1)[0]

    def key(self, name: str = "student") -> str:
        return keys.create(self.database, self.users[name].id, "test", None)[1]

    def worker(self, **more: object) -> Worker:
        options: dict[str, object] = {"lease_seconds": 5.0, "attempts": 2, "parser": parse_lines}
        options |= more
        return Worker(
            self.database,
            DocumentStorage(self.settings.documents_dir),
            FakeRetrieval(),
            index_dir=self.settings.index_dir,
            **options,  # type: ignore[arg-type]
        )

    def work(self, **more: object) -> None:
        """Do all jobs that are waiting."""
        worker = self.worker(**more)
        while worker.run_once():
            pass

    def upload(self, name: str, content: bytes, who: str = "teacher") -> httpx2.Response:
        return self.client(who).post(
            f"/api/courses/{self.course.id}/documents", files={"file": (name, content)}
        )

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.database.close()


def make_world(settings: Settings, url: str) -> World:
    database = Database(settings.database)
    hashed = Passwords(settings.argon2_memory_kib, settings.argon2_rounds).hash(PASSWORD)
    roles = {
        "admin": "administrator",
        "teacher": "teacher",
        "student": "student",
        "stranger": "student",
        "other_teacher": "teacher",
        "bystander": "student",
    }
    users = {
        name: User(
            username=name,
            display_name=name.title(),
            role=role,
            password_hash=hashed,
            must_change_password=False,
        )
        for name, role in roles.items()
    }
    course, other = Course(slug="one", name="One"), Course(slug="two", name="Two")
    with database.write() as session:
        session.add_all([*users.values(), course, other])
        session.flush()
        for member, where, role in (
            ("teacher", course, "teacher"),
            ("student", course, "student"),
            ("stranger", other, "student"),
            ("other_teacher", other, "teacher"),
        ):
            session.add(Enrolment(course_id=where.id, user_id=users[member].id, role=role))
    return World(settings, url, database, users, course, other)


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `condition` holds; fails after `seconds`."""
    tick, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        tick.wait(0.02)


def events(lines: Sequence[str]) -> list[tuple[str, dict[str, object]]]:
    """(event, data) of a server-sent event stream."""
    found, name = [], ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            found.append((name, json.loads(line[6:])))
    return found
