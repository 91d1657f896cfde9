"""Liveness and metrics of the backend."""

from fastapi import APIRouter, Request, Response
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from backend.accounts.dependencies import is_neighbour
from backend.accounts.models import LoginSession
from backend.context import Context, ContextDep
from backend.database import utcnow
from backend.documents.models import Document
from backend.errors import ApiError
from monitoring.metrics import JOB_STATES

router = APIRouter(tags=["health"])


@router.get("/health")
def health(context: ContextDep) -> dict[str, str]:
    try:
        context.database.ping()
    except SQLAlchemyError as error:
        raise ApiError(503, "database_unavailable", "The database is not answering.") from error
    return {"status": "ok"}


@router.get("/metrics")
def metrics(request: Request, context: ContextDep) -> Response:
    """For a scraper of ours; from elsewhere the address does not exist."""
    if not is_neighbour(request, context.settings):
        raise ApiError(404, "not_found", "There is nothing at this address.")
    _count(context)
    body, kind = context.metrics.render()
    return Response(body, media_type=kind)


def _count(context: Context) -> None:
    with context.database.read() as session:
        rows = session.execute(
            select(Document.state, func.count())
            .where(Document.deleted_at.is_(None))
            .group_by(Document.state)
        )
        states = dict(rows.all())
        sessions = session.execute(
            select(func.count()).select_from(LoginSession).where(LoginSession.expires_at > utcnow())
        ).scalar_one()
    for state in JOB_STATES:
        context.metrics.index_jobs.labels(state=state).set(states.get(state, 0))
    context.metrics.sessions.set(sessions)
