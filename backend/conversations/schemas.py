"""What the conversation routes take and give."""

from datetime import datetime

from pydantic import BaseModel, Field

from backend.conversations.models import MessageState
from backend.documents.schemas import PassageOut


class ConversationIn(BaseModel):
    title: str = Field(default="", max_length=200)


class TitleIn(BaseModel):
    title: str = Field(min_length=1, max_length=200)


class MessageIn(BaseModel):
    content: str = Field(min_length=1, max_length=32_000)


class NumberedPassage(PassageOut):
    """`n` is the number the answer cites it by."""

    n: int


class LeftOut(BaseModel):
    turns: int = 0
    passages: int = 0


class ConversationOut(BaseModel):
    id: int
    course_id: int
    title: str
    created_at: datetime
    updated_at: datetime


class MessageOut(BaseModel):
    id: int
    role: str
    content: str
    state: MessageState
    error: str | None
    passages: list[NumberedPassage]
    citations: list[int]
    left_out: LeftOut
    created_at: datetime


class ConversationWithMessages(ConversationOut):
    messages: list[MessageOut]
