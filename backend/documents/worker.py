"""The index worker: takes jobs one at a time until it is told to stop.

Kill it when you like: what it had not finished is done again by the next worker. Files are renamed
into place, rows are written in short transactions, and a document counts as ready only in the same
transaction that announces the index generation holding it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from sqlalchemy import delete, select, update

from backend.courses.models import Course
from backend.database import Database, utcnow
from backend.documents import jobs
from backend.documents.jobs import Claim
from backend.documents.models import Document, IndexJob, Passage
from backend.documents.parsing import ParseCrash, ParsedDocument, ParseError, Parser
from backend.documents.retrieval import IndexPassage, IndexUnusable, Retrieval
from backend.documents.storage import DocumentStorage
from backend.errors import DISK_FULL, is_disk_full

log = structlog.get_logger("worker")

_IDLE_SECONDS = 0.5
_SLICE = 100  # rows in one transaction: a few milliseconds, far below the 50 allowed
_PROGRESS_SECONDS = 0.5
_PARSED = 0.3  # share of the progress bar that reading takes; the rest is embedding


class JobLost(Exception):
    """Another worker holds the job now; drop it without a trace."""


class Worker:
    def __init__(
        self,
        database: Database,
        storage: DocumentStorage,
        retrieval: Retrieval,
        parser: Parser,
        index_dir: Path,
        *,
        lease_seconds: float,
        attempts: int,
    ) -> None:
        self._database = database
        self._storage = storage
        self._retrieval = retrieval
        self._parser = parser
        self._index_dir = index_dir
        self._lease = lease_seconds
        self._attempts = attempts
        self._name = jobs.worker_name()
        self._current: Claim | None = None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. A database that is away for a while is waited for."""
        self.queue_unusable_indexes()
        while not stop.is_set():
            try:
                worked = self.run_once()
            except Exception:
                log.exception("the job table could not be used")
                worked = False
            if not worked:
                stop.wait(_IDLE_SECONDS)

    def give_back(self) -> None:
        """A graceful stop in mid-job: the job goes back and the attempt does not count."""
        claim = self._current  # the thread that works may be done with it at any moment
        if claim is None:
            return
        try:
            jobs.give_back(self._database, claim)
        except Exception:  # then another worker takes it when the lease runs out
            log.exception("job could not be given back", job=claim.job_id)

    def run_once(self) -> bool:
        """Take one job and see it through; False when none is waiting."""
        claim = jobs.claim(self._database, self._name, self._lease, self._attempts)
        if claim is None:
            return False
        log.info("job begun", job=claim.job_id, kind=claim.kind, attempt=claim.attempt)
        began = time.monotonic()
        self._current = claim
        with self._heartbeat(claim):
            self._work(claim)
        self._current = None
        log.info("job ended", job=claim.job_id, seconds=round(time.monotonic() - began, 2))
        return True

    def _work(self, claim: Claim) -> None:
        try:
            if claim.kind == "parse":
                self._parse(claim)
            else:
                self._index(claim)
        except JobLost:
            log.warning("job was taken by another worker", job=claim.job_id)
        except (ParseError, IndexUnusable) as error:
            jobs.fail(self._database, claim, str(error))
        except Exception as error:
            log.exception("job failed", job=claim.job_id)
            reason = DISK_FULL if is_disk_full(error) else _unexpected(error)
            jobs.fail(self._database, claim, reason, retry=True, attempts=self._attempts)

    @contextmanager
    def _heartbeat(self, claim: Claim) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._lease / 4):
                try:
                    jobs.heartbeat(self._database, claim, self._lease)
                except Exception:
                    log.exception("heartbeat failed", job=claim.job_id)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # -- reading one document

    def _parse(self, claim: Claim) -> None:
        document = self._begin_parse(claim)
        if document is None:
            return
        source = self._storage.original(document.sha256)
        if not source.exists():
            raise ParseError("The stored file is missing. Upload the document again.")
        parsed = self._parser(source, document.name)
        self._storage.write_text(document.id, parsed.text)
        self._replace_passages(claim, document.id, parsed)
        with self._database.write() as session:
            job = _still_mine(jobs.held(session, claim))
            session.execute(
                update(Document)
                .where(Document.id == document.id)
                .values(
                    title=(parsed.title or document.name)[:300],
                    passages=len(parsed.passages),
                    parsed_at=utcnow(),
                    progress=_PARSED,
                )
            )
            jobs.finish(session, job)
            jobs.queue_index(session, claim.course_id)

    def _begin_parse(self, claim: Claim) -> Document | None:
        with self._database.write() as session:
            job = _still_mine(jobs.held(session, claim))
            document = session.get(Document, claim.document_id)
            if document is None or document.deleted_at is not None:
                jobs.finish(session, job)
                return None
            document.state, document.error, document.progress = "indexing", None, 0.05
            document.parsed_at = None
            return document

    def _replace_passages(self, claim: Claim, document_id: int, parsed: ParsedDocument) -> None:
        while True:
            with self._database.write() as session:
                _still_mine(jobs.held(session, claim))
                old = select(Passage.id).where(Passage.document_id == document_id).limit(_SLICE)
                ids = list(session.execute(old).scalars())
                session.execute(delete(Passage).where(Passage.id.in_(ids)))
            if len(ids) < _SLICE:
                break
        for start in range(0, len(parsed.passages), _SLICE):
            with self._database.write() as session:
                _still_mine(jobs.held(session, claim))
                session.add_all(
                    Passage(
                        document_id=document_id,
                        text=passage.text.replace("\0", "\ufffd"),  # PostgreSQL stores no NUL
                        heading_path=passage.heading_path,
                        page=passage.page,
                        start=passage.start,
                        end=passage.end,
                    )
                    for passage in parsed.passages[start : start + _SLICE]
                )

    # -- building a course's index

    def _index(self, claim: Claim) -> None:
        documents = self._parsed_documents(claim.course_id)
        passages = [p for document in documents for p in self._passages(document)]
        waiting = [d.id for d in documents if d.state != "ready"]
        if passages:
            reported = time.monotonic()

            def progress(done: int, total: int) -> None:
                nonlocal reported
                if time.monotonic() - reported >= _PROGRESS_SECONDS and total:
                    reported = time.monotonic()
                    self._report(waiting, _PARSED + (1 - _PARSED) * done / total)

            self._retrieval.build(self._index_dir / str(claim.course_id), passages, progress)
        self._announce(claim, waiting, built=bool(passages))
        self._clear_tombstones(claim.course_id)

    def _parsed_documents(self, course_id: int) -> list[Document]:
        with self._database.read() as session:
            return list(
                session.execute(
                    select(Document)
                    .where(
                        Document.course_id == course_id,
                        Document.deleted_at.is_(None),
                        Document.parsed_at.is_not(None),
                        Document.state.in_(("indexing", "ready")),
                    )
                    .order_by(Document.id)
                ).scalars()
            )

    def _passages(self, document: Document) -> list[IndexPassage]:
        with self._database.read() as session:
            rows = session.execute(
                select(Passage).where(Passage.document_id == document.id).order_by(Passage.id)
            ).scalars()
            return [
                IndexPassage(
                    p.id, document.title, p.text, tuple(p.heading_path), p.page, p.start, p.end
                )
                for p in rows
            ]

    def _report(self, documents: list[int], share: float) -> None:
        with self._database.write() as session:
            session.execute(
                update(Document)
                .where(Document.id.in_(documents), Document.state == "indexing")
                .values(progress=round(min(share, 0.99), 3))
            )

    def _announce(self, claim: Claim, documents: list[int], *, built: bool) -> None:
        """New generation, ready documents and the finished job appear in one transaction."""
        with self._database.write() as session:
            job = _still_mine(jobs.held(session, claim))
            session.execute(
                update(Document)
                .where(
                    Document.id.in_(documents),
                    Document.state == "indexing",
                    Document.parsed_at.is_not(None),
                )
                .values(state="ready", progress=1.0, error=None)
            )
            # An upload under the name of an older document takes its place, now that it is ready.
            for document in session.execute(
                select(Document).where(Document.id.in_(documents), Document.state == "ready")
            ).scalars():
                session.execute(
                    update(Document)
                    .where(
                        Document.course_id == document.course_id,
                        Document.name == document.name,
                        Document.id < document.id,
                        Document.deleted_at.is_(None),
                    )
                    .values(deleted_at=utcnow())
                )
            if built:
                session.execute(
                    update(Course)
                    .where(Course.id == claim.course_id)
                    .values(index_generation=Course.index_generation + 1)
                )
            jobs.finish(session, job)

    def _clear_tombstones(self, course_id: int) -> None:
        """Remove what a deleted document leaves, now that no index names its passages."""
        with self._database.read() as session:
            gone = list(
                session.execute(
                    select(Document).where(
                        Document.course_id == course_id, Document.deleted_at.is_not(None)
                    )
                ).scalars()
            )
        for document in gone:
            while self._delete_passages(document.id):
                pass
            with self._database.write() as session:
                session.execute(delete(IndexJob).where(IndexJob.document_id == document.id))
                session.execute(delete(Document).where(Document.id == document.id))
                others = session.execute(
                    select(Document.id).where(Document.sha256 == document.sha256)
                ).first()
            self._storage.remove_text(document.id)
            if others is None:
                self._storage.remove_original(document.sha256)

    def _delete_passages(self, document_id: int) -> bool:
        with self._database.write() as session:
            ids = list(
                session.execute(
                    select(Passage.id).where(Passage.document_id == document_id).limit(_SLICE)
                ).scalars()
            )
            session.execute(delete(Passage).where(Passage.id.in_(ids)))
        return len(ids) == _SLICE

    def queue_unusable_indexes(self) -> None:
        """At start: an index that another embedder made, or that is damaged, is built again."""
        with self._database.read() as session:
            courses = list(
                session.execute(select(Course.id).where(Course.index_generation > 0)).scalars()
            )
        for course_id in courses:
            try:
                self._retrieval.open(self._index_dir / str(course_id))
            except IndexUnusable as error:
                log.warning("index will be built again", course=course_id, reason=str(error))
                with self._database.write() as session:
                    jobs.queue_index(session, course_id)


def _still_mine(job: IndexJob | None) -> IndexJob:
    if job is None:
        raise JobLost
    return job


def _unexpected(error: Exception) -> str:
    what = str(error) if isinstance(error, ParseCrash) else type(error).__name__
    return (
        f"This document could not be indexed ({what}). Retry it; if that does not help, upload it "
        "in another format."
    )
