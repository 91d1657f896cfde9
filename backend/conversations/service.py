"""Conversations and messages in the database."""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select, update

from backend.conversations.models import Conversation, Message
from backend.conversations.schemas import (
    ConversationOut,
    ConversationWithMessages,
    LeftOut,
    MessageOut,
    NumberedPassage,
)
from backend.database import Database, utcnow
from backend.errors import ApiError, not_found

INTERRUPTED = "The server was restarted while this answer was written. Ask again."
NOT_STORED = "This answer could not be stored. Ask again."
_TITLE_LENGTH = 60
# An answer that is stored as streaming but runs nowhere this long after its question was lost, for
# instance because the disk was full when it ended.
_LOST_AFTER = timedelta(seconds=10)


def list_conversations(database: Database, course_id: int, user_id: int) -> list[Conversation]:
    with database.read() as session:
        return list(
            session.execute(
                select(Conversation)
                .where(Conversation.course_id == course_id, Conversation.user_id == user_id)
                .order_by(Conversation.updated_at.desc(), Conversation.id.desc())
            ).scalars()
        )


def create(database: Database, course_id: int, user_id: int, title: str) -> Conversation:
    conversation = Conversation(course_id=course_id, user_id=user_id, title=title)
    with database.write() as session:
        session.add(conversation)
    return conversation


def messages(database: Database, conversation_id: int) -> list[Message]:
    with database.read() as session:
        return list(
            session.execute(
                select(Message)
                .where(Message.conversation_id == conversation_id)
                .order_by(Message.id)
            ).scalars()
        )


def last_answer(database: Database, conversation_id: int) -> Message | None:
    with database.read() as session:
        return session.execute(
            select(Message)
            .where(Message.conversation_id == conversation_id, Message.role == "assistant")
            .order_by(Message.id.desc())
            .limit(1)
        ).scalar_one_or_none()


def rename(database: Database, conversation_id: int, title: str) -> Conversation:
    with database.write() as session:
        conversation = session.get(Conversation, conversation_id)
        if conversation is None:
            raise not_found("conversation")
        conversation.title = title
    return conversation


def remove(database: Database, conversation_id: int) -> None:
    with database.write() as session:
        session.execute(delete(Conversation).where(Conversation.id == conversation_id))


def title_from(question: str) -> str:
    """The first line of the first question, cut at a word where there is one."""
    line = " ".join(question.split())
    if len(line) <= _TITLE_LENGTH:
        return line
    cut = line[:_TITLE_LENGTH]
    space = cut.rfind(" ")
    return (cut[:space] if space > _TITLE_LENGTH // 2 else cut).rstrip() + "…"


def is_lost(message: Message) -> bool:
    """Whether a message of a conversation without a running answer will never be finished."""
    return message.state == "streaming" and utcnow() - message.created_at > _LOST_AFTER


def ask(database: Database, conversation_id: int, question: str, *, running: bool) -> int:
    """Store question and empty answer; returns the answer's id. Raises ApiError 409 while an
    answer is running; `running` is whether this process is writing one."""
    with database.write() as session:
        # Locking the conversation makes two questions at once wait for each other on PostgreSQL.
        conversation = session.execute(
            select(Conversation).where(Conversation.id == conversation_id).with_for_update()
        ).scalar_one_or_none()
        if conversation is None:
            raise not_found("conversation")
        for message in session.execute(
            select(Message).where(
                Message.conversation_id == conversation_id, Message.state == "streaming"
            )
        ).scalars():
            if running or not is_lost(message):
                raise ApiError(
                    409,
                    "answer_running",
                    "An answer is still being written in this conversation. Wait for it or stop "
                    "it.",
                )
            message.state, message.error = "failed", NOT_STORED
        now = utcnow()
        if not conversation.title:
            conversation.title = title_from(question)
        conversation.updated_at = now
        session.add(
            Message(
                conversation_id=conversation_id,
                role="user",
                content=question,
                state="complete",
                created_at=now,
            )
        )
        session.flush()
        answer = Message(
            conversation_id=conversation_id, role="assistant", state="streaming", created_at=now
        )
        session.add(answer)
        session.flush()
        return answer.id


def write_answer(database: Database, message_id: int, values: dict[str, Any]) -> None:
    with database.write() as session:
        session.execute(update(Message).where(Message.id == message_id).values(**values))


def fail_interrupted(database: Database) -> int:
    """At start no answer is running: what a killed backend left is failed, its text kept."""
    with database.write() as session:
        rows = session.execute(
            update(Message)
            .where(Message.state == "streaming")
            .values(state="failed", error=INTERRUPTED)
            .returning(Message.id)
        ).all()
        return len(rows)


def conversation_out(conversation: Conversation) -> ConversationOut:
    return ConversationOut(
        id=conversation.id,
        course_id=conversation.course_id,
        title=conversation.title,
        created_at=conversation.created_at,
        updated_at=conversation.updated_at,
    )


def message_out(message: Message) -> MessageOut:
    return MessageOut(
        id=message.id,
        role=message.role,
        content=message.content,
        state=message.state,  # type: ignore[arg-type]  # checked by the database
        error=message.error,
        passages=[NumberedPassage.model_validate(passage) for passage in message.passages],
        citations=[int(number) for number in message.citations],
        left_out=LeftOut(turns=message.left_out_turns, passages=message.left_out_passages),
        created_at=message.created_at,
    )


def with_messages(
    conversation: Conversation, found: list[Message], running_text: str | None
) -> ConversationWithMessages:
    """`running_text` is newer than the slice of a running answer that is in the database; without
    one nothing runs."""
    out = [message_out(message) for message in found]
    if running_text is None and found and is_lost(found[-1]):
        out[-1].state, out[-1].error = "failed", NOT_STORED
    if running_text is not None and out and out[-1].state == "streaming":
        out[-1].content = running_text
    return ConversationWithMessages(**conversation_out(conversation).model_dump(), messages=out)
