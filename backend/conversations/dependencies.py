"""Loading one's own conversation, in a course one still belongs to; anything else is a 404."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from backend.accounts.dependencies import CurrentUser
from backend.accounts.models import User
from backend.context import ContextDep
from backend.conversations.models import Conversation
from backend.courses.models import Course
from backend.courses.service import course_for
from backend.errors import not_found
from backend.ids import RowId


@dataclass(frozen=True)
class OwnConversation:
    user: User
    course: Course
    conversation: Conversation


def own_conversation(
    conversation_id: RowId, user: CurrentUser, context: ContextDep
) -> OwnConversation:
    with context.database.read() as session:
        conversation = session.get(Conversation, conversation_id)
        if conversation is None or conversation.user_id != user.id:
            raise not_found("conversation")
        found = course_for(session, user, conversation.course_id)
    if found is None:
        raise not_found("conversation")
    return OwnConversation(user, found[0], conversation)


Own = Annotated[OwnConversation, Depends(own_conversation)]
