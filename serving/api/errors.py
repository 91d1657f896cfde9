"""Errors as clients see them: always an object with message, type, param and code."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from serving.errors import (
    EngineDeadError,
    InvalidRequestError,
    LecternError,
    OverloadedError,
)

#: Seconds after which a client may try again while the engine starts or restarts.
RETRY_AFTER = 5

_TYPES = {
    404: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ApiError(LecternError):
    """An answer other than success, decided by the API itself."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status, "invalid_request")
        self.param = param
        self.headers = headers or {}


class NotReadyError(ApiError):
    """The engine cannot produce a token now, but will be able to."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(503, message, code, headers={"Retry-After": str(RETRY_AFTER)})


def to_api_error(error: BaseException, *, stopping: bool = False) -> ApiError:
    """What a client is told about `error`. Anything unforeseen becomes a bare 500.

    `stopping` tells that the engine ended on purpose and will not come back by itself.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(error.status, error.message, error.code, error.param)
    if isinstance(error, OverloadedError):
        seconds = max(1, math.ceil(error.retry_after))
        headers = {"Retry-After": str(seconds)}
        return ApiError(429, error.message, "engine_overloaded", headers=headers)
    if isinstance(error, EngineDeadError) and stopping:
        return NotReadyError(
            "The engine was stopped while it worked on this request.", "engine_stopping"
        )
    if isinstance(error, EngineDeadError):
        return NotReadyError(
            "The engine stopped while it worked on this request and is being restarted; "
            "send the request again.",
            "engine_restarting",
        )
    return ApiError(
        500,
        "The server failed on this request; its log has the reason under the request id.",
        "internal_error",
    )


def error_object(error: ApiError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> Response:
    return Response(
        msgspec.json.encode(error_object(error)),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )
