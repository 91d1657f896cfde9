"""The overview for administrators."""

from fastapi import APIRouter
from sqlalchemy import func, select

from backend.accounts.dependencies import Administrator
from backend.accounts.models import LoginSession, User
from backend.admin.schemas import BackendFigures, EngineFigures, Overview, Point
from backend.context import ContextDep
from backend.courses.models import Course
from backend.database import Database, utcnow
from backend.documents.models import Document
from backend.usage.models import TokenBudget, UsageRecord

router = APIRouter(prefix="/api/admin", tags=["admin"])


def _backend_figures(database: Database, live_streams: int) -> BackendFigures:
    today = utcnow().date()
    with database.read() as session:
        rows = session.execute(
            select(Document.state, func.count())
            .where(Document.deleted_at.is_(None))
            .group_by(Document.state)
        )
        documents = dict(rows.all())
        tokens = session.execute(
            select(func.coalesce(func.sum(TokenBudget.used), 0)).where(TokenBudget.day == today)
        ).scalar_one()
        requests = session.execute(
            select(func.count()).select_from(UsageRecord).where(UsageRecord.day == today)
        ).scalar_one()
        sessions = session.execute(
            select(func.count()).select_from(LoginSession).where(LoginSession.expires_at > utcnow())
        ).scalar_one()
        users = session.execute(
            select(func.count()).select_from(User).where(User.active.is_(True))
        ).scalar_one()
        courses = session.execute(select(func.count()).select_from(Course)).scalar_one()
    return BackendFigures(
        live_streams=live_streams,
        sessions=sessions,
        users=users,
        courses=courses,
        documents=documents,
        tokens_today=int(tokens),
        requests_today=requests,
    )


@router.get("/overview")
async def overview(_: Administrator, context: ContextDep) -> Overview:
    model = await context.upstream.model()
    figures = await context.database.run(_backend_figures, context.database, len(context.streams))
    return Overview(
        engine=EngineFigures.model_validate(context.engine.figures(model.id if model else None)),
        series=[Point.model_validate(point) for point in context.engine.series()],
        backend=figures,
    )
