"""Writing answers: one background task each, which lives on when the page is dropped."""

import asyncio
import time
from typing import Any

import httpx2
import msgspec
import structlog

from backend.context import Context
from backend.conversations import service
from backend.conversations.answer import Answer
from backend.conversations.question import PreparedQuestion, prepare
from backend.courses.models import Course
from backend.errors import ApiError, error_body, from_exception
from backend.gateway.service import PAGE_CLASS, service_headers
from backend.gateway.sse import EventSplitter, event_json
from backend.upstream import ModelInfo, error_of, unavailable
from backend.usage.metering import Meter
from backend.usage.service import Caller, Cost
from rag import citations

log = structlog.get_logger("backend.answers")
# A killed backend loses no more than what came in this time.
_SAVE_SECONDS = 0.5
_STOPPED = "stopped"
_ENDED = "Your account was deactivated."


class Generations:
    """The running answers of this process, by conversation."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[Answer, _Writer, asyncio.Task[None]]] = {}

    def get(self, conversation_id: int) -> Answer | None:
        found = self._running.get(conversation_id)
        return found[0] if found else None

    def start(
        self, context: Context, course: Course, user_id: int, conversation_id: int, question: str,
        message_id: int,
    ) -> Answer:  # fmt: skip
        answer = Answer(message_id)
        writer = _Writer(context, course, user_id, conversation_id, question, answer)
        task = asyncio.create_task(writer.run())
        self._running[conversation_id] = (answer, writer, task)
        task.add_done_callback(lambda _: self._running.pop(conversation_id, None))
        return answer

    async def stop(self, conversation_id: int) -> None:
        """End the answer and keep what is there; returns when it is stored."""
        found = self._running.get(conversation_id)
        if found is not None:
            found[1].stop(_STOPPED)
            await asyncio.wait([found[2]])

    async def close(self) -> None:
        """The backend goes down: running answers end as interrupted, their text kept."""
        running = list(self._running.values())
        for _, writer, _ in running:
            writer.stop(service.INTERRUPTED)
        if running:
            await asyncio.wait([task for _, _, task in running])


class _Writer:
    def __init__(
        self,
        context: Context,
        course: Course,
        user_id: int,
        conversation_id: int,
        question: str,
        answer: Answer,
    ) -> None:
        self._context = context
        self._course = course
        self._user_id = user_id
        self._conversation_id = conversation_id
        self._question = question
        self._answer = answer
        self._work: asyncio.Task[str] | None = None
        self._reason: str | None = None
        self._prepared: PreparedQuestion | None = None
        self._usage: dict[str, Any] | None = None
        self._pieces = 0

    def stop(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._work is not None:
            self._work.cancel()

    async def run(self) -> None:
        self._work = asyncio.create_task(self._write())
        if self._reason is not None:
            self._work.cancel()
        with self._context.streams.running(self._user_id, None, lambda: self.stop(_ENDED)):
            outcome = (await asyncio.gather(self._work, return_exceptions=True))[0]
        try:
            if isinstance(outcome, str):
                await self._close_done("complete", outcome)
            elif self._reason == _STOPPED:
                await self._close_done("stopped", "stopped")
            else:
                await self._close_failed(self._explain(outcome))
        except Exception as error:
            # The database itself failed (a full disk): the readers are told all the same, and the
            # next start of the backend marks the message.
            problem = from_exception(error)
            self._answer.close("error", problem.body())
            log.exception("an answer could not be stored", message=self._answer.message_id)

    async def _write(self) -> str:
        context = self._context
        model = await context.upstream.require_model()
        prepared = self._prepared = await prepare(
            context,
            model,
            self._course,
            self._conversation_id,
            self._question,
            self._answer.message_id,
        )
        await self._save(
            passages=prepared.passages,
            left_out_turns=prepared.left_out_turns,
            left_out_passages=prepared.left_out_passages,
        )
        left_out = {"turns": prepared.left_out_turns, "passages": prepared.left_out_passages}
        self._answer.show_passages(prepared.passages, left_out)
        caller = Caller(self._user_id, "page", course_id=self._course.id)
        meter = await context.ledger.open(caller, prepared.prompt_tokens + prepared.answer_tokens)
        status = "failed"
        try:
            finish_reason = await self._stream(model, prepared)
            status = "complete"
            return finish_reason
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            await self._settle(meter, model, prepared, status)

    async def _stream(self, model: ModelInfo, prepared: PreparedQuestion) -> str:
        body: dict[str, Any] = {
            "model": model.id,
            "messages": prepared.messages,
            "max_tokens": prepared.answer_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if model.is_lectern:
            body["cache_salt"] = self._course.salt
        client = self._context.upstream.client
        request = client.build_request(
            "POST",
            "/v1/chat/completions",
            content=msgspec.json.encode(body),
            headers={"content-type": "application/json"}
            | service_headers(model, self._user_id, PAGE_CLASS),
        )
        response = await client.send(request, stream=True)
        try:
            if response.status_code >= 400:
                wait = response.headers.get("retry-after")
                raise error_of(response.status_code, await response.aread(), wait)
            return await self._read(response)
        finally:
            await response.aclose()

    async def _read(self, response: httpx2.Response) -> str:
        splitter = EventSplitter()
        finish_reason: str | None = None
        saved = float("-inf")  # the first words are stored at once
        async for chunk in response.aiter_raw():
            for event in splitter.feed(chunk):
                finish_reason = self._take(event) or finish_reason
            if time.monotonic() - saved >= _SAVE_SECONDS:
                saved = time.monotonic()
                await self._save(content=self._answer.text)
        if finish_reason is None:
            raise httpx2.RemoteProtocolError("the stream ended before its finish_reason")
        return finish_reason

    def _take(self, event: bytes) -> str | None:
        """Take one event in; returns the finish_reason once it is there."""
        data = event_json(event)
        if data is None:
            return None
        if isinstance(data.get("error"), dict):
            message = str(data["error"].get("message", "The model server reported an error."))
            raise ApiError(502, str(data["error"].get("code") or "upstream_error"), message)
        if isinstance(data.get("usage"), dict):
            self._usage = data["usage"]
        for choice in data.get("choices") or []:
            text = (choice.get("delta") or {}).get("content")
            if text:
                self._pieces += 1
                self._answer.write(text)
            if choice.get("finish_reason"):
                return str(choice["finish_reason"])
        return None

    async def _settle(
        self, meter: Meter, model: ModelInfo, prepared: PreparedQuestion, status: str
    ) -> None:
        usage = self._usage or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counted = isinstance(prompt, int) and isinstance(completion, int)
        if status == "failed" and not self._pieces and not counted:
            await meter.release()
            return
        await meter.settle(
            Cost(
                model=model.id,
                prompt_tokens=int(prompt) if prompt and counted else prepared.prompt_tokens,
                completion_tokens=int(completion or 0) if counted else self._pieces,
                status=status,
                estimated=not counted,
            )
        )

    async def _save(self, **values: Any) -> None:
        await self._context.database.run(
            service.write_answer, self._context.database, self._answer.message_id, values
        )

    def _citations(self) -> list[int]:
        passages = self._prepared.passages if self._prepared else []
        return citations.find(self._answer.text, len(passages))

    async def _close_done(self, state: str, finish_reason: str) -> None:
        cited = self._citations()
        await self._save(
            content=self._answer.text, state=state, finish_reason=finish_reason, citations=cited
        )
        usage = self._usage or {}
        self._answer.close(
            "done",
            {
                "message_id": self._answer.message_id,
                "finish_reason": finish_reason,
                "citations": cited,
                "usage": {
                    "prompt_tokens": usage.get("prompt_tokens"),
                    "completion_tokens": usage.get("completion_tokens"),
                },
            },
        )

    async def _close_failed(self, error: ApiError) -> None:
        await self._save(
            content=self._answer.text,
            state="failed",
            error=error.message,
            citations=self._citations(),
        )
        body = error_body(error.status, error.code, error.message, error.param)
        self._answer.close("error", {**body, "message_id": self._answer.message_id})

    def _explain(self, outcome: BaseException) -> ApiError:
        if self._reason is not None:
            return ApiError(503, "answer_interrupted", self._reason)
        if isinstance(outcome, ApiError):
            refused = outcome.status == 429 and outcome.code == "engine_overloaded"
            return _busy(outcome) if refused else outcome
        if isinstance(outcome, httpx2.HTTPError | ValueError):
            self._context.metrics.upstream_errors.labels(reason="upstream_cut").inc()
            if not self._answer.text:
                return unavailable()
            return ApiError(
                502,
                "upstream_cut",
                "The model server broke off in the middle of the answer. What had arrived is "
                "kept; ask again.",
            )
        log.error("an answer failed", message=self._answer.message_id, exc_info=outcome)
        return from_exception(outcome)


def _busy(error: ApiError) -> ApiError:
    """The refusal of an engine with a long queue, for people instead of programs."""
    seconds = error.headers["Retry-After"]
    return ApiError(
        error.status,
        error.code,
        f"Many are asking now. Try again in {seconds} s.",
        headers=error.headers,
    )
