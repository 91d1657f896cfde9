"""Documents of a course: accept, list, retry, delete, read."""

from pathlib import PurePosixPath
from typing import BinaryIO

from sqlalchemy import select

from backend.courses.models import Course
from backend.database import Database, utcnow
from backend.documents import jobs
from backend.documents.models import Document, Passage
from backend.documents.schemas import DocumentText, PassageInPlace, PassageOut
from backend.documents.storage import DocumentStorage
from backend.errors import ApiError, not_found

_CONTEXT_CHARACTERS = 600
_MAX_NAME = 255


def clean_name(name: str) -> str:
    """The last part of the path a browser sent, without signs no file name needs."""
    base = PurePosixPath(name.replace("\\", "/")).name
    return "".join(sign for sign in base if sign.isprintable()).strip()[-_MAX_NAME:]


def accept(
    database: Database,
    storage: DocumentStorage,
    course_id: int,
    user_id: int | None,
    name: str,
    source: BinaryIO,
    limit: int,
) -> Document:
    """Store a file and queue it. The same file under the same name is taken in only once."""
    if not name:
        raise ApiError(400, "invalid_value", "The file has no name.", param="file")
    stored = storage.save(source, limit)
    with database.write() as session:
        same = (
            session.execute(
                select(Document).where(
                    Document.course_id == course_id,
                    Document.name == name,
                    Document.sha256 == stored.sha256,
                    Document.deleted_at.is_(None),
                    Document.state != "failed",
                )
            )
            .scalars()
            .first()
        )
        if same is not None:
            return same
        document = Document(
            course_id=course_id,
            name=name,
            title=name,
            sha256=stored.sha256,
            bytes=stored.bytes,
            state="queued",
            progress=0.0,
            passages=0,
            uploaded_by=user_id,
            uploaded_at=utcnow(),
        )
        session.add(document)
        session.flush()
        jobs.queue_parse(session, document)
    return document


def list_documents(database: Database, course_id: int) -> list[Document]:
    with database.read() as session:
        return list(
            session.execute(
                select(Document)
                .where(Document.course_id == course_id, Document.deleted_at.is_(None))
                .order_by(Document.name, Document.id)
            ).scalars()
        )


def get(database: Database, course_id: int, document_id: int) -> Document:
    with database.read() as session:
        document = session.get(Document, document_id)
    if document is None or document.course_id != course_id or document.deleted_at is not None:
        raise not_found("document")
    return document


def delete(database: Database, course_id: int, document_id: int) -> None:
    """Put up the tombstone: the next search no longer sees the document. Vectors follow."""
    with database.write() as session:
        document = session.get(Document, document_id)
        if document is None or document.course_id != course_id or document.deleted_at is not None:
            raise not_found("document")
        document.deleted_at = utcnow()
        jobs.queue_index(session, course_id)


def retry(database: Database, course_id: int, document_id: int) -> Document:
    """Queue a document again; one that is waiting or running already is left as it is."""
    with database.write() as session:
        document = session.get(Document, document_id)
        if document is None or document.course_id != course_id or document.deleted_at is not None:
            raise not_found("document")
        if document.state in ("failed", "ready"):
            document.state, document.error, document.progress = "queued", None, 0.0
            document.parsed_at = None
            jobs.queue_parse(session, document)
    return document


def text(database: Database, storage: DocumentStorage, document: Document) -> DocumentText:
    try:
        return DocumentText(title=document.title, text=storage.read_text(document.id))
    except FileNotFoundError as error:
        raise ApiError(
            409, "not_indexed", "This document has not been read yet. Wait until it is ready."
        ) from error


def passage_out(passage: Passage, document: Document, score: float = 0.0) -> PassageOut:
    return PassageOut(
        id=passage.id,
        document_id=document.id,
        document=document.name,
        title=document.title,
        heading_path=[str(part) for part in passage.heading_path],
        page=passage.page,
        start=passage.start,
        end=passage.end,
        text=passage.text,
        score=score,
    )


def passage_in_place(
    database: Database, storage: DocumentStorage, course_id: int, passage_id: int
) -> PassageInPlace:
    """A passage with the text around it; 404 when it is another course's or was deleted."""
    with database.read() as session:
        row = session.execute(
            select(Passage, Document)
            .join(Document, Document.id == Passage.document_id)
            .where(
                Passage.id == passage_id,
                Document.course_id == course_id,
                Document.deleted_at.is_(None),
            )
        ).one_or_none()
    if row is None:
        raise not_found("passage")
    passage, document = row
    whole = text(database, storage, document).text
    return PassageInPlace(
        **passage_out(passage, document).model_dump(),
        before=whole[max(0, passage.start - _CONTEXT_CHARACTERS) : passage.start],
        after=whole[passage.end : passage.end + _CONTEXT_CHARACTERS],
    )


def live_passages(
    database: Database, course_id: int, ids: list[int]
) -> dict[int, tuple[Passage, Document]]:
    """Those of `ids` that may be shown now: in this course, ready, not deleted."""
    with database.read() as session:
        rows = session.execute(
            select(Passage, Document)
            .join(Document, Document.id == Passage.document_id)
            .where(
                Passage.id.in_(ids),
                Document.course_id == course_id,
                Document.deleted_at.is_(None),
                Document.state == "ready",
            )
        )
        return {passage.id: (passage, document) for passage, document in rows}


def index_generation(database: Database, course_id: int) -> int:
    with database.read() as session:
        return session.execute(
            select(Course.index_generation).where(Course.id == course_id)
        ).scalar_one()
