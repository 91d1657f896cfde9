"""What every part of the backend shares: made once at start, handed in by dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

if TYPE_CHECKING:
    from backend.accounts.passwords import Passwords
    from backend.admin.scrape import EngineWatch
    from backend.conversations.generation import Generations
    from backend.database import Database
    from backend.documents.search import CourseSearch
    from backend.documents.storage import DocumentStorage
    from backend.gateway.limits import RequestWindow
    from backend.gateway.streams import LiveStreams
    from backend.keys.service import KeyCheck
    from backend.settings import Settings
    from backend.upstream import Upstream
    from backend.usage.metering import Ledger
    from monitoring.metrics import BackendMetrics


@dataclass(frozen=True)
class Context:
    settings: Settings
    database: Database
    metrics: BackendMetrics
    passwords: Passwords
    upstream: Upstream
    keys: KeyCheck
    requests: RequestWindow
    ledger: Ledger
    streams: LiveStreams
    storage: DocumentStorage
    search: CourseSearch
    answers: Generations
    engine: EngineWatch


async def get_context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(get_context)]
