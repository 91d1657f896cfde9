"""Upload, indexing, search, deletion, and jobs that survive the death of a worker."""

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select, update

from backend.accounts.models import User
from backend.courses.models import Course
from backend.database import Database, utcnow
from backend.documents import jobs, service
from backend.documents.models import Document, IndexJob, Passage
from backend.documents.parsing import ChildParser, ParseCrash, ParsedDocument, ParseError
from backend.documents.storage import DocumentStorage
from backend.documents.worker import Worker
from tests.backend.world import FakeRetrieval, World, parse_lines, wait_for

NOTES = b"# Notes\nA basic block has one entry.\nA live range ends at the last use.\n"


def listed(world: World) -> dict[str, dict[str, object]]:
    rows = world.client("student").get(f"/api/courses/{world.course.id}/documents").json()
    return {row["name"]: row for row in rows}


def found(world: World, query: str = "basic block") -> list[str]:
    path = f"/api/courses/{world.course.id}/search"
    rows = world.client("student").get(path, params={"q": query}).json()["passages"]
    return [row["text"] for row in rows]


def test_upload_to_search(world: World) -> None:
    answer = world.upload("folder/notes.txt", NOTES)
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    assert answer.json()["name"] == "notes.txt"
    world.work()
    document = listed(world)["notes.txt"]
    assert (document["state"], document["passages"], document["progress"]) == ("ready", 3, 1.0)
    assert document["title"] == "Notes"
    assert document["bytes"] == len(NOTES)
    assert found(world)[0] == "A basic block has one entry."
    base, student = f"/api/courses/{world.course.id}", world.client("student")
    passage = student.get(f"{base}/search", params={"q": "live range"}).json()["passages"][0]
    place = student.get(f"{base}/passages/{passage['id']}").json()
    text = student.get(f"{base}/documents/{document['id']}/text").json()["text"]
    assert text[place["start"] : place["end"]].strip() == place["text"] == passage["text"]
    assert place["before"].endswith("one entry.\n")
    assert place["after"] == ""


def test_deletion_shows_in_the_next_query(world: World) -> None:
    world.upload("notes.txt", NOTES)
    world.upload("more.txt", b"Another basic block.\n")
    world.work()
    base, document = f"/api/courses/{world.course.id}", listed(world)["notes.txt"]
    path = f"{base}/documents/{document['id']}"
    passage = world.client("student").get(f"{base}/search", params={"q": "live"}).json()
    number = passage["passages"][0]["id"]
    assert world.client("teacher").delete(path).status_code == 204
    # No worker has run: the vectors are still there, the tombstone is enough.
    assert found(world) == ["Another basic block."]
    assert list(listed(world)) == ["more.txt"]
    assert world.client("student").get(f"{path}/text").status_code == 404
    assert world.client("student").get(f"{base}/passages/{number}").status_code == 404
    world.work()
    with world.database.read() as session:
        assert session.query(Document).count() == 1
        assert session.query(Passage).count() == 1
    kept = [p for p in (world.settings.documents_dir / "originals").rglob("*") if p.is_file()]
    assert len(kept) == 1
    assert found(world) == ["Another basic block."]


def test_deleting_the_last_document_empties_the_course(world: World) -> None:
    world.upload("notes.txt", NOTES)
    world.work()
    path = f"/api/courses/{world.course.id}/documents/{listed(world)['notes.txt']['id']}"
    world.client("teacher").delete(path)
    world.work()
    assert found(world) == []


def test_same_file_twice_is_one_document(world: World) -> None:
    first, second = world.upload("notes.txt", NOTES), world.upload("notes.txt", NOTES)
    assert first.json()["id"] == second.json()["id"]


def test_new_version_takes_the_place_of_the_old_one_when_ready(world: World) -> None:
    world.upload("notes.txt", NOTES)
    world.work()
    world.upload("notes.txt", b"A basic block was rewritten.\n")
    assert "A basic block has one entry." in found(world)
    world.work()
    assert found(world) == ["A basic block was rewritten."]
    assert len(listed(world)) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "empty.txt is empty; there is nothing to search."),
        ("notes.exe", b"MZ", "notes.exe is of a kind that cannot be read."),
    ],
)
def test_documents_that_cannot_be_read_say_why(
    world: World, name: str, content: bytes, sentence: str
) -> None:
    world.upload(name, content)
    world.work()
    document = listed(world)[name]
    assert (document["state"], document["error"]) == ("failed", sentence)
    # Retrying is possible and ends the same way; nothing else is stuck behind it.
    path = f"/api/courses/{world.course.id}/documents/{document['id']}/retry"
    assert world.client("teacher").post(path).json()["state"] == "queued"
    world.upload("notes.txt", NOTES)
    world.work()
    assert {name: row["state"] for name, row in listed(world).items()} == {
        name: "failed",
        "notes.txt": "ready",
    }


class TestLimits:
    @pytest.fixture
    def more_settings(self) -> dict[str, object]:
        return {"max_upload_bytes": 2 * 1024 * 1024}

    def test_large_uploads_are_refused_without_being_held(self, world: World) -> None:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = 200 * 1024 * 1024
        boundary = "xxxxboundary"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            'filename="big.txt"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        piece = b"x" * 65_536

        def pieces(total: int) -> object:
            yield head
            for _ in range(total // len(piece)):
                yield piece
            yield tail

        path = f"/api/courses/{world.course.id}/documents"
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        told = headers | {"content-length": str(len(head) + size + len(tail))}
        for total, sent in ((size, told), (8 * 1024 * 1024, headers)):
            answer = world.client("teacher").post(path, content=pieces(total), headers=sent)
            assert answer.status_code == 413
            assert "2 MB" in answer.json()["error"]["message"]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50 * 1024  # kilobytes
        assert listed(world) == {}

    def test_the_largest_allowed_upload_is_taken(self, world: World) -> None:
        assert world.upload("big.txt", b"x" * 2 * 1024 * 1024).status_code == 202
        assert world.upload("big.txt", b"x" * (2 * 1024 * 1024 + 1)).status_code == 413


def test_upload_without_a_file_is_a_bad_request(world: World) -> None:
    path = f"/api/courses/{world.course.id}/documents"
    answer = world.client("teacher").post(path, data={"x": "y"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"


# -- jobs, on both databases


@pytest.fixture
def course(database: Database) -> Course:
    made = Course(slug="c", name="C")
    with database.write() as session:
        session.add_all([made, User(username="u", display_name="U", role="student",
                                    password_hash="-")])  # fmt: skip
    return made


def accept(database: Database, course: Course, folder: Path, name: str = "a.txt") -> Document:
    import io

    storage = DocumentStorage(folder / "documents")
    source = io.BytesIO(b"A basic block in " + name.encode())
    return service.accept(database, storage, course.id, None, name, source, 10_000)


def worker_for(database: Database, folder: Path, parser: object = parse_lines) -> Worker:
    return Worker(
        database,
        DocumentStorage(folder / "documents"),
        FakeRetrieval(),
        parser,  # type: ignore[arg-type]
        folder / "index",
        lease_seconds=2.0,
        attempts=2,
    )


def state(database: Database, document: Document) -> Document:
    with database.read() as session:
        row = session.get(Document, document.id)
    assert row is not None
    return row


def test_each_job_goes_to_one_worker(database: Database, course: Course, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for number in range(12):
        accept(database, course, tmp_path, f"{number}.txt")
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(lambda n: jobs.claim(database, f"host{n}:1:1", 60, 2), range(20)))
    numbers = [claim.job_id for claim in claims if claim is not None]
    assert len(numbers) == len(set(numbers)) == 12


def test_silent_worker_loses_its_job_and_can_change_nothing(
    database: Database, course: Course, tmp_path: Path
) -> None:
    document = accept(database, course, tmp_path)
    lost = jobs.claim(database, "elsewhere:1:1", 60, 2)
    assert lost is not None
    assert jobs.claim(database, "me:1:1", 60, 2) is None
    assert jobs.heartbeat(database, lost, 60)
    with database.write() as session:
        session.execute(update(IndexJob).values(lease_until=utcnow() - timedelta(seconds=1)))
    taken = jobs.claim(database, "me:1:1", 60, 2)
    assert taken is not None
    assert (taken.job_id, taken.attempt) == (lost.job_id, 2)
    assert not jobs.heartbeat(database, lost, 60)
    jobs.fail(database, lost, "too late")
    assert state(database, document).state == "queued"
    # The second worker dies as well: the attempts are used up and the document says so.
    with database.write() as session:
        session.execute(update(IndexJob).values(lease_until=utcnow() - timedelta(seconds=1)))
    assert jobs.claim(database, "me:1:1", 60, 2) is None
    assert state(database, document).error == jobs.DIED.format(attempts=2)


def test_a_job_given_back_does_not_count_the_attempt(
    database: Database, course: Course, tmp_path: Path
) -> None:
    accept(database, course, tmp_path)
    claim = jobs.claim(database, "me:1:1", 60, 1)
    assert claim is not None
    jobs.give_back(database, claim)
    again = jobs.claim(database, "me:1:1", 60, 1)
    assert again is not None
    assert again.attempt == 1


def test_crashes_are_retried_and_end(database: Database, course: Course, tmp_path: Path) -> None:
    document, calls = accept(database, course, tmp_path), []

    def crash_once(source: Path, name: str) -> ParsedDocument:
        calls.append(name)
        if len(calls) == 1:
            raise ParseCrash("the parser ended with code -11")
        return parse_lines(source, name)

    worker = worker_for(database, tmp_path, crash_once)
    while worker.run_once():
        pass
    assert state(database, document).state == "ready"

    def always(source: Path, name: str) -> ParsedDocument:
        raise ParseCrash("the parser ended with code -11")

    other = accept(database, course, tmp_path, "b.txt")
    worker = worker_for(database, tmp_path, always)
    while worker.run_once():
        pass
    failed = state(database, other)
    assert failed.state == "failed"
    assert "code -11" in str(failed.error)


def test_full_disk_is_said_in_words(database: Database, course: Course, tmp_path: Path) -> None:
    import errno

    document = accept(database, course, tmp_path)

    def full(source: Path, name: str) -> ParsedDocument:
        raise OSError(errno.ENOSPC, "No space left on device")

    worker = worker_for(database, tmp_path, full)
    while worker.run_once():
        pass
    assert "disk of the server is full" in str(state(database, document).error)


KILLED_WORKER = """
import sys, threading
from pathlib import Path
from backend import logs
from backend.database import Database
from tests.backend import test_documents as t, world
where = sys.argv[3]
logs.configure()
def hang(*_, **__):
    print("hanging", flush=True)
    threading.Event().wait()
parser = hang if where == "parse" else world.parse_lines
worker = t.worker_for(Database(sys.argv[1]), Path(sys.argv[2]), parser)
if where == "embed":
    worker._retrieval.build = hang
if where == "announce":
    worker._announce = hang
worker.run(threading.Event())
"""


@pytest.mark.parametrize("where", ["parse", "embed", "announce"])
def test_killed_worker_is_followed_by_the_next(
    database: Database, course: Course, tmp_path: Path, where: str
) -> None:
    document = accept(database, course, tmp_path)
    url = database.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WORKER, url, str(tmp_path), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"hanging\n"
        assert state(database, document).state == "indexing"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stop = threading.Event()
    following = worker_for(database, tmp_path)
    thread = threading.Thread(target=following.run, args=(stop,))
    thread.start()
    try:
        wait_for(lambda: state(database, document).state == "ready", 20)
    finally:
        stop.set()
        thread.join()
    with database.read() as session:
        assert session.query(Passage).count() == 1
        jobs_left = session.execute(select(IndexJob.state)).scalars().all()
    assert set(jobs_left) == {"done"}


# -- the child that reads


CHILD = """
import resource, sys
from backend.documents import parse_child
def read(source, name):
    {body}
parse_child._read = read
parse_child.main()
"""


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float = 20) -> None:
    (tmp_path / "odd_child.py").write_text(CHILD.format(body=body))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    ChildParser(seconds, 700 * 1024 * 1024, "odd_child")(source, "a.md")


def test_child_that_eats_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParseError, match="more memory"):
        child(tmp_path, monkeypatch, "return {'x': ' ' * (2 << 30)}")


def test_child_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParseError, match="longer than 1 seconds"):
        child(tmp_path, monkeypatch, "import threading; threading.Event().wait()", 1.0)


def test_child_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParseCrash, match="code -11"):
        child(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 11)")


def test_real_documents_through_the_real_child(tmp_path: Path) -> None:
    parser = ChildParser(60, 2 << 30)
    source = tmp_path / "source"
    source.write_bytes("# Blocks\n\nA basic block has one entry. 基本块。\n".encode())
    parsed = parser(source, "blocks.md")
    assert parsed.title == "Blocks"
    assert [p.heading_path for p in parsed.passages] == [["Blocks"]]
    assert "基本块" in parsed.text
    for name, content in (("a.pdf", b"not a pdf"), ("a.md", b""), ("a.xyz", b"x")):
        source.write_bytes(content)
        with pytest.raises(ParseError) as failed:
            parser(source, name)
        assert str(failed.value).endswith(".")


def test_encrypted_pdf_through_the_real_child(tmp_path: Path) -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas

    path = tmp_path / "locked.pdf"
    canvas = Canvas(str(path), encrypt=StandardEncryption("secret", canPrint=0))
    canvas.drawString(100, 700, "hidden")
    canvas.save()
    with pytest.raises(ParseError, match=r"(?i)password|encrypt"):
        ChildParser(60, 2 << 30)(path, "locked.pdf")


def test_health_of_the_page_while_indexing(world: World) -> None:
    world.upload("notes.txt", NOTES)
    metrics = httpx2.get(world.url + "/metrics").text
    assert 'lectern_backend_index_jobs{state="queued"} 1.0' in metrics


def test_graceful_stop_in_the_middle_of_a_job(
    database: Database, course: Course, tmp_path: Path
) -> None:
    document, begun, go = accept(database, course, tmp_path), threading.Event(), threading.Event()

    def slow(source: Path, name: str) -> ParsedDocument:
        begun.set()
        assert go.wait(20)
        return parse_lines(source, name)

    worker = worker_for(database, tmp_path, slow)
    thread = threading.Thread(target=worker.run_once)
    thread.start()
    assert begun.wait(20)
    worker.give_back()
    go.set()
    thread.join()
    # What the stopped worker still did has changed nothing; the next one starts afresh.
    assert state(database, document).parsed_at is None
    claim = jobs.claim(database, "next:1:1", 60, 2)
    assert claim is not None
    assert (claim.kind, claim.attempt) == ("parse", 1)
