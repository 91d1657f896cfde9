"""Around every request: a request id, a size limit, one log line, metrics, and no bare 500."""

import re
import time
import uuid

import structlog
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.errors import error_body, from_exception, respond
from backend.settings import Settings
from monitoring.metrics import BackendMetrics

log = structlog.get_logger("backend.http")
_MULTIPART_ROOM = 64 * 1024
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")


class RequestMiddleware:
    """The outermost layer. Written for raw ASGI, because streams pass through it chunk by chunk."""

    def __init__(self, app: ASGIApp, metrics: BackendMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began = time.perf_counter()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            if status:
                raise
            log.exception("request failed")
            await respond(from_exception(error))(scope, receive, send_on)
        finally:
            self._record(scope, status, time.perf_counter() - began)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if route != "unmatched" else "any"
        self._metrics.http_requests.labels(route=route, method=method, status=str(status)).inc()
        self._metrics.http_seconds.labels(route=route, method=method).observe(seconds)
        if route == "/health" and status == 200:
            return  # asked by a supervisor several times a second while things start
        # The path template, not the path or the query: a query can hold what a student asked.
        log.info(
            "request", method=scope["method"], route=route, status=status,
            milliseconds=round(seconds * 1000, 1),
        )  # fmt: skip


class BodyLimitMiddleware:
    """Refuses bodies that are too large before they are read, and cuts off those that lie.

    What the client still sends is read and dropped up to a bound, so that it gets to read the
    answer instead of a reset connection. Nothing of it is kept in memory.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    def _limit(self, scope: Scope) -> tuple[int, int]:
        """(limit of the body, limit to name to people)"""
        path: str = scope["path"]
        if path.startswith("/api/courses/") and path.endswith("/documents"):
            limit = self._settings.max_upload_bytes
            return limit + _MULTIPART_ROOM, limit
        return self._settings.max_request_bytes, self._settings.max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, named = self._limit(scope)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        sentence = (
            f"The request is larger than the {max(1, named // (1024 * 1024))} MB allowed here. "
            "Send less, or split it into parts."
        )
        if length.isdigit() and int(length) > limit:
            await _drain(receive, 8 * self._settings.max_upload_bytes)
            body = error_body(413, "request_too_large", sentence)
            await JSONResponse(body, status_code=413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise HTTPException(413, sentence)
            return message

        await self._app(scope, counted, send)


async def _drain(receive: Receive, most: int) -> None:
    seen = 0
    while seen < most:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        seen += len(message.get("body", b""))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex
