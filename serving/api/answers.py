"""From a parsed request to its HTTP answer."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.api.choice import Delta, ShownToken
from serving.api.dialect import Dialect
from serving.api.errors import error_object, to_api_error
from serving.api.fields import ignored_header
from serving.api.generation import Generation, Ping
from serving.api.logs import log
from serving.api.service import ModelService
from serving.api.service_headers import read_wanted
from serving.api.stream import EventStream, first_of, until_gone

_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"


async def answer(
    service: ModelService, request: Request, dialect: Dialect, unique_id: str
) -> Response:
    """Generate, and answer whole or as a stream.

    A stream's status is sent with its first event, so that an error before any token, such as that
    of an overloaded engine, has its own status; a long wait in the queue sends a ping first.
    """
    wanted = read_wanted(request.headers, service.classes)
    generation = Generation(service, unique_id, dialect.plan, wanted)
    record = _Record(request, dialect, generation)
    headers = ignored_header(dialect.ignored)
    events = cast(AsyncGenerator[Delta | Ping, None], generation.events())
    try:
        if not dialect.stream:
            body = await until_gone(request.receive, _collect(events, dialect, generation))
            record.write("done")
            return Response(body, headers=headers, media_type="application/json")
        first = await until_gone(request.receive, first_of(events))
    except BaseException as error:
        await events.aclose()
        record.write(type(error).__name__)
        raise
    return EventStream(_frames(service, first, events, dialect, generation, record), headers)


async def _collect(
    events: AsyncGenerator[Delta | Ping, None], dialect: Dialect, generation: Generation
) -> bytes:
    texts: list[list[str]] = [[] for _ in generation.choices]
    tokens: list[list[ShownToken]] = [[] for _ in generation.choices]
    async with aclosing(events) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                texts[event.index].append(event.text)
                tokens[event.index] += event.tokens
    choices = [
        dialect.answer_choice(
            choice.index,
            "".join(texts[choice.index]),
            tokens[choice.index],
            choice.finish_reason or "stop",
        )
        for choice in generation.choices
    ]
    return msgspec.json.encode(dialect.answer(choices, generation.usage()))


async def _frames(
    service: ModelService,
    first: Delta | Ping,
    events: AsyncGenerator[Delta | Ping, None],
    dialect: Dialect,
    generation: Generation,
    record: _Record,
) -> AsyncGenerator[bytes, None]:
    opened: set[int] = set()
    outcome = "hang-up"
    try:
        async with aclosing(events) as stream:
            yield _frame_of(first, dialect, opened)
            async for event in stream:
                yield _frame_of(event, dialect, opened)
        if dialect.include_usage:
            yield _data(dialect.usage_chunk(generation.usage()))
        yield _DONE
        outcome = "done"
    except Exception as error:
        # The status line is out: an error event is the only way left to tell the client.
        outcome = type(error).__name__
        told = to_api_error(error, stopping=service.stopping)
        if told.status == 500:
            log(logging.ERROR, "a stream failed", exc_info=error, request=record.request_id)
        yield _data(error_object(told))
    finally:
        record.write(outcome)


def _frame_of(event: Delta | Ping, dialect: Dialect, opened: set[int]) -> bytes:
    if isinstance(event, Ping):
        return _PING
    out = b""
    if event.index not in opened:
        opened.add(event.index)
        opening = dialect.opening(event.index)
        if opening is not None:
            out += _data(dialect.chunk([opening]))
    for choice in dialect.chunk_choices(event):
        out += _data(dialect.chunk([choice]))
    return out


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class _Record:
    """One log line for each request that reached the engine."""

    def __init__(self, request: Request, dialect: Dialect, generation: Generation) -> None:
        self.request_id = request.state.request_id
        self._dialect = dialect
        self._generation = generation
        self._began = time.monotonic()

    def write(self, outcome: str) -> None:
        generation = self._generation
        log(
            logging.INFO,
            self._dialect.answer_object,
            request=self.request_id,
            outcome=outcome,
            stream=self._dialect.stream,
            choices=len(generation.choices),
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            ttft=generation.first_token_seconds,
            seconds=time.monotonic() - self._began,
        )
