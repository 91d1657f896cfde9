"""A user's own usage."""

from typing import Annotated

from fastapi import APIRouter, Query

from backend.accounts.dependencies import CurrentUser
from backend.context import ContextDep
from backend.usage import service
from backend.usage.schemas import UsageOut

router = APIRouter(prefix="/api/usage", tags=["usage"])


@router.get("")
def usage(
    user: CurrentUser, context: ContextDep, days: Annotated[int, Query(ge=1, le=366)] = 30
) -> UsageOut:
    return service.report(context.database, user.id, days, context.settings.daily_tokens)
