"""What the document and search routes give."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from backend.documents.models import DocumentState


class DocumentOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str
    title: str
    state: DocumentState
    error: str | None
    passages: int
    bytes: int
    uploaded_at: datetime
    progress: float


class DocumentText(BaseModel):
    title: str
    text: str


class PassageOut(BaseModel):
    """A passage; `start` and `end` index into the text of its document."""

    id: int
    document_id: int
    document: str
    title: str
    heading_path: list[str]
    page: int | None
    start: int
    end: int
    text: str
    score: float = 0.0


class PassageInPlace(PassageOut):
    before: str
    after: str


class SearchOut(BaseModel):
    passages: list[PassageOut]
