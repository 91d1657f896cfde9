"""Conversations of a user in a course, and the stream of an answer."""

from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from backend.context import ContextDep
from backend.conversations import service
from backend.conversations.answer import Answer
from backend.conversations.dependencies import Own
from backend.conversations.models import Message
from backend.conversations.schemas import (
    ConversationIn,
    ConversationOut,
    ConversationWithMessages,
    MessageIn,
    TitleIn,
)
from backend.courses.dependencies import Member
from backend.errors import ApiError, error_body
from backend.usage.service import has_budget, over_budget

router = APIRouter(prefix="/api", tags=["conversations"])


def _sse(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(
        events,
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


@router.get("/courses/{course_id}/conversations")
def list_conversations(member: Member, context: ContextDep) -> list[ConversationOut]:
    found = service.list_conversations(context.database, member.course.id, member.user.id)
    return [service.conversation_out(conversation) for conversation in found]


@router.post("/courses/{course_id}/conversations", status_code=201)
def create_conversation(
    body: ConversationIn, member: Member, context: ContextDep
) -> ConversationWithMessages:
    conversation = service.create(
        context.database, member.course.id, member.user.id, body.title.strip()
    )
    return service.with_messages(conversation, [], None)


@router.get("/conversations/{conversation_id}")
async def get_conversation(own: Own, context: ContextDep) -> ConversationWithMessages:
    conversation = own.conversation
    found = await context.database.run(service.messages, context.database, conversation.id)
    running = context.answers.get(conversation.id)
    return service.with_messages(conversation, found, running.text if running else None)


@router.patch("/conversations/{conversation_id}")
def rename_conversation(body: TitleIn, own: Own, context: ContextDep) -> ConversationOut:
    renamed = service.rename(context.database, own.conversation.id, body.title.strip())
    return service.conversation_out(renamed)


@router.delete("/conversations/{conversation_id}", status_code=204)
async def delete_conversation(own: Own, context: ContextDep) -> Response:
    await context.answers.stop(own.conversation.id)
    await context.database.run(service.remove, context.database, own.conversation.id)
    return Response(status_code=204)


@router.post("/conversations/{conversation_id}/messages")
async def ask(body: MessageIn, own: Own, context: ContextDep) -> StreamingResponse:
    question = body.content.strip()
    if not question:
        raise ApiError(400, "invalid_value", "Write a question first.", param="content")
    database, daily = context.database, context.settings.daily_tokens
    if not await database.run(has_budget, database, own.user.id, daily):
        context.metrics.quota_refusals.inc()
        raise over_budget()
    running = context.answers.get(own.conversation.id) is not None
    store = partial(service.ask, database, own.conversation.id, question, running=running)
    message_id = await database.run(store)
    answer = context.answers.start(
        context, own.course, own.user.id, own.conversation.id, question, message_id
    )
    return _sse(answer.events())


@router.get("/conversations/{conversation_id}/stream")
async def attach(own: Own, context: ContextDep) -> StreamingResponse:
    """Read along with the running answer, or once more through the last one."""
    answer = context.answers.get(own.conversation.id)
    if answer is None:
        last = await context.database.run(
            service.last_answer, context.database, own.conversation.id
        )
        # The answer may have ended, or a new one begun, while the database was read.
        answer = context.answers.get(own.conversation.id)
        if answer is None and last is not None:
            answer = _replay(last)
    if answer is None:
        raise ApiError(404, "no_answer", "There is no answer in this conversation yet.")
    return _sse(answer.events())


def _replay(message: Message) -> Answer:
    answer = Answer(message.id)
    left_out = {"turns": message.left_out_turns, "passages": message.left_out_passages}
    answer.show_passages(list(message.passages), left_out)
    answer.write(message.content)
    if message.state in ("failed", "streaming"):
        reason = message.error or service.NOT_STORED
        answer.close(
            "error", {**error_body(502, "answer_failed", reason), "message_id": message.id}
        )
    else:
        answer.close(
            "done",
            {
                "message_id": message.id,
                "finish_reason": message.finish_reason or "stop",
                "citations": list(message.citations),
                "usage": {"prompt_tokens": None, "completion_tokens": None},
            },
        )
    return answer


@router.post("/conversations/{conversation_id}/stop", status_code=204)
async def stop(own: Own, context: ContextDep) -> Response:
    await context.answers.stop(own.conversation.id)
    return Response(status_code=204)
