"""What chat and completion endpoints share: a parsed request and the frames of its answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from serving.api.body import Body
from serving.api.choice import Delta, ShownToken
from serving.api.errors import ApiError
from serving.api.generation import Plan
from serving.api.service import ServedModel
from serving.errors import InvalidRequestError


class Dialect(ABC):
    """One parsed request. Its frames all carry the same id, created and model."""

    #: `object` of stream chunks and of whole answers.
    chunk_object: str
    answer_object: str
    id_prefix: str

    def __init__(self, body: Body, model: ServedModel, request_id: str) -> None:
        self.model = model
        self.plan: Plan
        self.ignored: list[str] = []
        self.stream = body.flag("stream")
        self.include_usage = _include_usage(body, self.stream)
        self._id = f"{self.id_prefix}-{request_id}"
        self._created = int(time.time())

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice in a stream, before its first text."""

    @abstractmethod
    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """`choices` of the chunks that a delta becomes, one chunk each."""

    @abstractmethod
    def answer_choice(
        self, index: int, text: str, tokens: list[ShownToken], finish_reason: str
    ) -> dict[str, Any]:
        """One entry of `choices` in a whole answer."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = self._head(self.chunk_object)
        found["choices"] = choices
        if self.include_usage:
            found["usage"] = None
        return found

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.chunk_object), "choices": [], "usage": usage}

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.answer_object), "choices": choices, "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model.name,
        }


def check_model(body: Body, model: ServedModel) -> None:
    """Raise unless the field `model` names the served model."""
    if not body.has("model"):
        raise InvalidRequestError(
            f"model is missing; this server has {model.name!r}.", "model", code="missing_field"
        )
    name = body.text("model")
    if name != model.name:
        raise unknown_model(name, model)


def unknown_model(name: str, model: ServedModel) -> ApiError:
    return ApiError(
        404,
        f"There is no model {name[:200]!r} here; this server has {model.name!r}.",
        "model_not_found",
        "model",
    )


def _include_usage(body: Body, stream: bool) -> bool:
    if not body.has("stream_options"):
        return False
    options = Body(body.mapping("stream_options"))
    if not stream:
        raise InvalidRequestError(
            "stream_options is only allowed together with stream: true.", "stream_options"
        )
    if options.raw("continuous_usage_stats"):
        raise InvalidRequestError(
            "stream_options.continuous_usage_stats is not supported; use include_usage.",
            "stream_options.continuous_usage_stats",
            code="unsupported_parameter",
        )
    try:
        return options.flag("include_usage")
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"stream_options.{error.message}", f"stream_options.{error.param}", error.code
        ) from error
