"""The ASGI application: parts put together, background work started and stopped."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from backend import errors, health
from backend.accounts.passwords import Passwords
from backend.accounts.router import router as accounts_router
from backend.admin.router import router as admin_router
from backend.admin.scrape import EngineWatch
from backend.context import Context
from backend.conversations.generation import Generations
from backend.conversations.router import router as conversations_router
from backend.conversations.service import fail_interrupted
from backend.courses.router import router as courses_router
from backend.database import Database
from backend.documents.retrieval import Retrieval
from backend.documents.router import router as documents_router
from backend.documents.search import CourseSearch
from backend.documents.storage import DocumentStorage
from backend.gateway.limits import RequestWindow
from backend.gateway.router import router as gateway_router
from backend.gateway.streams import LiveStreams
from backend.keys.router import router as keys_router
from backend.keys.service import KeyCheck
from backend.middleware import BodyLimitMiddleware, RequestMiddleware
from backend.settings import Settings
from backend.upstream import Upstream
from backend.usage.metering import Ledger
from backend.usage.router import router as usage_router
from backend.usage.service import release_all
from monitoring.metrics import BackendMetrics

log = structlog.get_logger("backend")


def create_app(settings: Settings, retrieval: Retrieval | None = None) -> FastAPI:
    """Build the application. One process owns the database's running answers and reservations:
    do not start two backends on one home (the command holds a lock against it)."""
    metrics = BackendMetrics(CollectorRegistry())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context = _build(settings, metrics, retrieval)
        app.state.context = context
        await context.database.run(release_all, context.database)
        interrupted = await context.database.run(fail_interrupted, context.database)
        if interrupted:
            log.warning("answers were interrupted by the last stop", messages=interrupted)
        watchers = [
            asyncio.create_task(context.streams.watch()),
            asyncio.create_task(context.engine.watch()),
        ]
        threading.Thread(target=_warm_up, args=(context,), name="warm-up", daemon=True).start()
        try:
            yield
        finally:
            await context.answers.close()
            for task in watchers:
                task.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await context.ledger.close()
            await context.upstream.close()
            context.database.close()

    app = FastAPI(
        title="Lectern", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    errors.install(app)
    app.add_middleware(BodyLimitMiddleware, settings=settings)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    for router in (
        accounts_router,
        courses_router,
        documents_router,
        conversations_router,
        keys_router,
        usage_router,
        admin_router,
        gateway_router,
        health.router,
    ):
        app.include_router(router)
    return app


def _build(settings: Settings, metrics: BackendMetrics, retrieval: Retrieval | None) -> Context:
    if retrieval is None:
        from backend.documents.rag_retrieval import RagRetrieval

        retrieval = RagRetrieval(settings.embedder, settings.glossary)
    database = Database(settings.database)
    upstream = Upstream(
        settings.upstream_url, settings.read_upstream_key(), settings.upstream_timeout
    )
    return Context(
        settings=settings,
        database=database,
        metrics=metrics,
        passwords=Passwords(settings.argon2_memory_kib, settings.argon2_rounds),
        upstream=upstream,
        keys=KeyCheck(database),
        requests=RequestWindow(settings.requests_per_minute),
        ledger=Ledger(database, metrics, settings.daily_tokens),
        streams=LiveStreams(database),
        storage=DocumentStorage(settings.documents_dir),
        search=CourseSearch(database, retrieval, settings.index_dir, metrics),
        answers=Generations(),
        engine=EngineWatch(upstream),
    )


def _warm_up(context: Context) -> None:
    try:
        context.search.warm_up()
    except Exception:
        log.exception("the embedder could not be loaded; search will say so")
