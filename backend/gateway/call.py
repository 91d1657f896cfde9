"""One call passed through to the model server, as an ASGI response.

The call ends upstream as soon as the client is gone, streamed or not: the work and the watch for
the client's hang-up are two tasks, and whichever ends first ends the other.
"""

import asyncio
from typing import Any

import httpx2
import msgspec
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from backend.context import Context
from backend.errors import ApiError, error_body
from backend.gateway.request import ModelRequest
from backend.gateway.sse import StreamTap, encode_event
from backend.keys.service import KeyOwner
from backend.upstream import error_of, unavailable
from backend.usage.metering import Meter
from backend.usage.service import Cost

log = structlog.get_logger("backend.gateway")
# Above this many streams each one is read at most so often; the tokens in between arrive together
# and cost one pass instead of several. The first chunk of a stream never waits.
_CROWD = 24
_PACE_SECONDS = 0.02
_MAX_ANSWER = 64 * 1024 * 1024


class GatewayCall(Response):
    """Sends `request` to `path` upstream, relays the answer, settles the meter.

    `service` are headers for the model server, `headers` for the client.
    """

    def __init__(
        self,
        context: Context,
        owner: KeyOwner,
        path: str,
        request: ModelRequest,
        meter: Meter,
        service: dict[str, str],
        headers: dict[str, str],
        request_id: str,
    ) -> None:
        super().__init__()
        self._context = context
        self._owner = owner
        self._path = path
        self._request = request
        self._meter = meter
        self._service = service
        self._extra_headers = headers
        self._request_id = request_id
        self._started = False
        self._accepted = False
        self._stopped = False
        self._status = "failed"
        self._usage: dict[str, Any] | None = None
        self._tap = StreamTap(keep_usage=request.wants_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send))
        hang_up = asyncio.create_task(_hang_up(receive))

        def stop() -> None:
            self._stopped = True
            work.cancel()

        self._context.metrics.gateway_streams.inc()
        try:
            with self._context.streams.running(self._owner.user_id, self._owner.key_id, stop):
                await asyncio.wait({work, hang_up}, return_when=asyncio.FIRST_COMPLETED)
                client_gone = hang_up.done() and not work.done()
                if client_gone:
                    self._status = "cancelled"
                    work.cancel()
                outcome = (await asyncio.gather(work, return_exceptions=True))[0]
                if isinstance(outcome, BaseException) and not client_gone:
                    await self._explain(outcome, send)
        finally:
            # Also reached when the server itself is cancelled: nothing is left running.
            for task in (work, hang_up):
                task.cancel()
            self._context.metrics.gateway_streams.dec()
            await asyncio.shield(self._settle())

    async def _work(self, send: Send) -> None:
        headers = {"content-type": "application/json", "x-request-id": self._request_id}
        request = self._context.upstream.client.build_request(
            "POST", self._path, content=self._request.body, headers=headers | self._service
        )
        response = await self._context.upstream.client.send(request, stream=True)
        try:
            kind = response.headers.get("content-type", "application/json")
            if response.status_code >= 400:
                wait = response.headers.get("retry-after")
                raise error_of(response.status_code, await _read(response), wait)
            self._accepted = True
            if kind.startswith("text/event-stream"):
                await self._relay(response, send)
            else:
                await self._pass_on(response, kind, send)
        finally:
            await response.aclose()

    async def _relay(self, response: httpx2.Response, send: Send) -> None:
        tap = self._tap
        await self._start(
            send,
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            },
        )
        async for chunk in response.aiter_raw():
            out = tap.feed(chunk)
            if out:
                await send({"type": "http.response.body", "body": out, "more_body": True})
            if len(self._context.streams) > _CROWD:
                await asyncio.sleep(_PACE_SECONDS)
        if not tap.done and not tap.failed:
            raise httpx2.RemoteProtocolError("the stream ended before [DONE]")
        self._usage = tap.usage
        self._status = "failed" if tap.failed else "complete"
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, response: httpx2.Response, kind: str, send: Send) -> None:
        body = await _read(response)
        try:
            self._usage = msgspec.json.decode(body).get("usage")
        except (msgspec.DecodeError, AttributeError):
            self._usage = None
        self._status = "complete"
        await self._start(send, 200, {"content-type": kind, "content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send, status: int, headers: dict[str, str]) -> None:
        self._started = True
        pairs = [
            (k.lower().encode(), v.encode()) for k, v in (self._extra_headers | headers).items()
        ]
        await send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _explain(self, outcome: BaseException, send: Send) -> None:
        """Tell the client why its call ended: an error answer, or an error event in mid-stream."""
        error = self._error(outcome)
        if error.status >= 500:
            self._context.metrics.upstream_errors.labels(reason=error.code).inc()
        if not self._started:
            body = msgspec.json.encode(error.body())
            headers = {"content-type": "application/json", "content-length": str(len(body))}
            await self._start(send, error.status, headers | error.headers)
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        event = encode_event(error_body(error.status, error.code, error.message))
        # Half an event may be out already on an upstream that died in the middle of one: it was
        # held back by the tap, so the error event stands on a line of its own.
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _error(self, outcome: BaseException) -> ApiError:
        if isinstance(outcome, ApiError):
            return outcome
        if self._stopped:
            self._status = "cancelled"
            return ApiError(403, "access_ended", "Your account or key was ended.")
        if isinstance(outcome, asyncio.CancelledError):
            return unavailable()
        if isinstance(outcome, httpx2.ReadTimeout):
            return ApiError(504, "upstream_timeout", "The model server took too long to answer.")
        if isinstance(outcome, httpx2.HTTPError | ValueError):
            if self._started:
                return ApiError(
                    502,
                    "upstream_cut",
                    "The model server broke off in the middle of the answer. Ask again.",
                )
            return unavailable()
        log.error("a gateway call failed", exc_info=outcome, request_id=self._request_id)
        return ApiError(500, "internal_error", "Something went wrong on the server. Try again.")

    async def _settle(self) -> None:
        usage = self._usage or self._tap.usage or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counted = isinstance(prompt, int) and isinstance(completion, int)
        if not counted:
            if not self._accepted and self._status == "failed":
                await self._meter.release()  # refused or never reached the model
                return
            prompt = self._request.prompt_guess
            completion = max(0, self._tap.events - 1)  # the first event only names the role
        await self._meter.settle(
            Cost(
                model=self._request.model,
                prompt_tokens=int(prompt or 0),
                completion_tokens=int(completion or 0),
                status=self._status,
                estimated=not counted,
            )
        )


async def _read(response: httpx2.Response) -> bytes:
    parts, size = [], 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > _MAX_ANSWER:
            raise ValueError("the model server sent an answer without an end")
        parts.append(chunk)
    return b"".join(parts)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
