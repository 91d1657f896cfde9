"""The job table: claim with a lease, heartbeat, finish, retry.

A job belongs to the worker whose name it carries and to nobody else; every change by a worker is
guarded by that name and the number of the attempt, so a worker that was thought dead and comes back
can change nothing. A job whose worker died is queued again until its attempts are used up.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, case, delete, select, update
from sqlalchemy.orm import Session

from backend.database import Database, utcnow
from backend.documents.models import Document, IndexJob

# A course index that waits this long goes before further documents.
_INDEX_PATIENCE = timedelta(seconds=20)
_KEEP_DONE = timedelta(days=7)
DIED = (
    "Reading this document ended the index worker {attempts} times, so it was given up. Check the "
    "file, then retry or upload another version."
)


@dataclass(frozen=True)
class Claim:
    """A job this worker holds. `attempt` counts from 1."""

    job_id: int
    kind: str
    course_id: int
    document_id: int | None
    worker: str
    attempt: int


def worker_name() -> str:
    """Host, process id and start time: a process id that is used again is another worker."""
    return f"{socket.gethostname()[:60]}:{os.getpid()}:{_start_time(os.getpid())}"


def _start_time(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def is_dead(worker: str) -> bool:
    """True only for a worker of this host whose process is gone."""
    host, pid, started = worker.rsplit(":", 2)
    if host != socket.gethostname()[:60] or not Path("/proc/self/stat").exists():
        return False
    return _start_time(int(pid)) != started


def queue_parse(session: Session, document: Document) -> None:
    session.add(IndexJob(kind="parse", course_id=document.course_id, document_id=document.id))


def queue_index(session: Session, course_id: int) -> None:
    """Ask for a new index generation, unless one is asked for already and not yet begun."""
    waiting = session.execute(
        select(IndexJob.id).where(
            IndexJob.kind == "index", IndexJob.state == "queued", IndexJob.course_id == course_id
        )
    ).first()
    if waiting is None:
        session.add(IndexJob(kind="index", course_id=course_id))


def claim(database: Database, worker: str, lease_seconds: float, attempts: int) -> Claim | None:
    """Take the next job, after putting back the jobs of dead workers."""
    now = utcnow()
    with database.write() as session:
        _put_back(session, attempts)
        old_index = (IndexJob.kind == "index") & (IndexJob.created_at < now - _INDEX_PATIENCE)
        rank = case((old_index, 0), (IndexJob.kind == "parse", 1), else_=2)
        job = session.execute(
            select(IndexJob)
            .where(IndexJob.state == "queued")
            .order_by(rank, IndexJob.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        ).scalar_one_or_none()
        if job is None:
            return None
        job.state, job.worker = "running", worker
        job.attempts += 1
        job.lease_until = now + timedelta(seconds=lease_seconds)
        session.execute(
            delete(IndexJob).where(
                IndexJob.state == "done", IndexJob.finished_at < now - _KEEP_DONE
            )
        )
        return Claim(job.id, job.kind, job.course_id, job.document_id, worker, job.attempts)


def _put_back(session: Session, attempts: int) -> None:
    now = utcnow()
    running = session.execute(
        select(IndexJob).where(IndexJob.state == "running").with_for_update(skip_locked=True)
    ).scalars()
    for job in running:
        expired = job.lease_until is None or job.lease_until < now
        if not expired and not is_dead(job.worker or "?:0:"):
            continue
        if job.attempts < attempts:
            job.state, job.worker, job.lease_until = "queued", None, None
        else:
            _fail(session, job, DIED.format(attempts=job.attempts))


def _fail(session: Session, job: IndexJob, reason: str) -> None:
    job.state, job.error, job.finished_at, job.lease_until = "failed", reason, utcnow(), None
    waiting: list[ColumnElement[bool]] = [Document.state.in_(("queued", "indexing"))]
    if job.document_id is not None:
        waiting.append(Document.id == job.document_id)
    else:
        waiting += [Document.course_id == job.course_id, Document.parsed_at.is_not(None)]
    session.execute(
        update(Document)
        .where(*waiting)
        .values(state="failed", error=reason, progress=0.0)
        .execution_options(synchronize_session=False)
    )


def held(session: Session, claim: Claim) -> IndexJob | None:
    """The job, locked, if this worker still holds it; None when it was taken away."""
    return session.execute(
        select(IndexJob)
        .where(
            IndexJob.id == claim.job_id,
            IndexJob.state == "running",
            IndexJob.worker == claim.worker,
            IndexJob.attempts == claim.attempt,
        )
        .with_for_update()
    ).scalar_one_or_none()


def heartbeat(database: Database, claim: Claim, lease_seconds: float) -> bool:
    """Extend the lease; False when the job is no longer this worker's."""
    with database.write() as session:
        job = held(session, claim)
        if job is not None:
            job.lease_until = utcnow() + timedelta(seconds=lease_seconds)
        return job is not None


def give_back(database: Database, claim: Claim) -> None:
    """A graceful stop: the job waits for the next worker and the attempt does not count."""
    with database.write() as session:
        job = held(session, claim)
        if job is not None:
            job.state, job.worker, job.lease_until = "queued", None, None
            job.attempts -= 1


def fail(
    database: Database, claim: Claim, reason: str, *, retry: bool = False, attempts: int = 1
) -> None:
    """The job went wrong; with `retry` it is queued again while attempts are left."""
    with database.write() as session:
        job = held(session, claim)
        if job is None:
            return
        if retry and job.attempts < attempts:
            job.state, job.worker, job.lease_until, job.error = "queued", None, None, reason
        else:
            _fail(session, job, reason)


def finish(session: Session, job: IndexJob) -> None:
    job.state, job.finished_at, job.lease_until, job.error = "done", utcnow(), None, None
