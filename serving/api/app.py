"""The routes of the engine's HTTP API."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.api.answers import answer
from serving.api.body import Body, read_object
from serving.api.chat import Chat, chat_prompt
from serving.api.completions import Completion, prompt_ids
from serving.api.dialect import check_model, unknown_model
from serving.api.errors import ApiError, error_response, to_api_error
from serving.api.fields import check_fields, ignored_header
from serving.api.logs import log
from serving.api.request_ids import RequestIds
from serving.api.sampling import check_token_ids
from serving.api.service import ModelService
from serving.api.stream import ClientGoneError
from serving.errors import InvalidRequestError

#: Status of an answer that nobody waits for; it only appears in tests of the application.
CLIENT_GONE = 499

#: Tokens that one call of /detokenize may hold.
MAX_DETOKENIZE = 1 << 20

_TOKENIZE = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "chat_template_kwargs", "messages",
        "model", "prompt", "reasoning_effort",
    }
)  # fmt: skip
_DETOKENIZE = frozenset({"model", "tokens"})

Handler = Callable[[Request], Awaitable[Response]]


@lru_cache
def lectern_version() -> str:
    """The installed version, or 0 when the package runs from a bare folder."""
    try:
        return version("lectern")
    except PackageNotFoundError:
        return "0"


def create_app(service: ModelService) -> FastAPI:
    """The application over one model. Starting and closing `service` is the caller's."""
    app = FastAPI(
        title="Lectern engine",
        version=lectern_version(),
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(RequestIds)
    app.add_exception_handler(HTTPException, _http_error)
    routes = Routes(service)
    for method, path, handler in (
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/health", routes.health),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", routes.metrics),
    ):
        app.router.add_route(path, _guarded(service, handler), methods=[method])
    return app


def _guarded(service: ModelService, handler: Handler) -> Handler:
    """Turn every error of a handler into an error object."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            told = to_api_error(error, stopping=service.stopping)
            if told.status == 500:
                log(
                    logging.ERROR,
                    "a request failed",
                    exc_info=error,
                    request=request.state.request_id,
                    path=request.url.path,
                )
            return error_response(told)

    return run


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        message = f"There is nothing at {path}; the API is under /v1."
    elif error.status_code == 405:
        message = f"{request.method} is not allowed at {path}."
    else:
        message = str(error.detail)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


def _json(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")


class Routes:
    """Handlers over one service. They raise; `_guarded` answers."""

    def __init__(self, service: ModelService) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.model.name:
            raise unknown_model(name, self._service.model)
        return _json(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "lectern",
            "max_model_len": self._service.engine.max_model_len,
            "x_lectern": {
                "untrained": model.untrained,
                "has_tokenizer": model.tokenizer is not None,
            },
        }

    async def chat(self, request: Request) -> Response:
        body = await read_object(request)
        unique_id = uuid.uuid4().hex
        dialect = await Chat.parse(body, self._service.model, self._service.engine, unique_id)
        return await answer(self._service, request, dialect, unique_id)

    async def completions(self, request: Request) -> Response:
        body = await read_object(request)
        unique_id = uuid.uuid4().hex
        dialect = await Completion.parse(body, self._service.model, self._service.engine, unique_id)
        return await answer(self._service, request, dialect, unique_id)

    async def tokenize(self, request: Request) -> Response:
        service, body = self._service, await read_object(request)
        ignored = check_fields(body, _TOKENIZE)
        self._check_optional_model(body)
        if body.has("messages") == body.has("prompt"):
            raise InvalidRequestError(
                "Send either prompt or messages.", "prompt", code="missing_field"
            )
        if body.has("messages"):
            tokens = await chat_prompt(body, service.model, service.engine)
        else:
            tokens = await prompt_ids(
                body.text("prompt"),
                service.model,
                service.engine,
                add_special_tokens=body.flag("add_special_tokens", True),
            )
        found = {
            "count": len(tokens),
            "max_model_len": service.engine.max_model_len,
            "tokens": tokens,
        }
        return _json(found, ignored_header(ignored))

    async def detokenize(self, request: Request) -> Response:
        service, body = self._service, await read_object(request)
        ignored = check_fields(body, _DETOKENIZE)
        self._check_optional_model(body)
        if not body.has("tokens"):
            raise InvalidRequestError("tokens is missing.", "tokens", code="missing_field")
        tokens = body.integers("tokens")
        if len(tokens) > MAX_DETOKENIZE:
            raise InvalidRequestError(
                f"tokens holds {len(tokens)} ids; at most {MAX_DETOKENIZE} are allowed.", "tokens"
            )
        check_token_ids(tokens, service.model, "tokens")
        tokenizer = service.model.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "This model has no tokenizer, so it has no text for tokens.",
                "tokens",
                code="no_tokenizer",
            )
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        return _json({"prompt": text}, ignored_header(ignored))

    def _check_optional_model(self, body: Body) -> None:
        if body.has("model"):
            check_model(body, self._service.model)

    async def health(self, request: Request) -> Response:
        """200 once a token can be produced; until then NotReadyError."""
        self._service.check_health()
        return _json({"status": "ready", "model": self._service.model.name})

    async def version(self, request: Request) -> Response:
        return _json({"version": lectern_version()})

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._service.metrics.render()
        return Response(body, headers={"Content-Type": content_type})
