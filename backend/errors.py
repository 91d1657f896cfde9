"""Errors people see: one shape over HTTP, one sentence on the command line."""

import errno
import sqlite3
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

log = structlog.get_logger("backend")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_PLAIN = {
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not answer that method."),
    413: ("request_too_large", ""),
}
DISK_FULL = (
    "The disk of the server is full, so nothing was saved. Ask an administrator to free space, "
    "then try again."
)


class StartupError(Exception):
    """A configuration fault: the command prints the sentence and exits with code 2."""


class ApiError(Exception):
    """An error with a status, answered as {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.code, self.message, self.param)


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "insufficient_quota" if code == "insufficient_quota" else _TYPES.get(status, "api_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def not_found(what: str) -> ApiError:
    """The one answer for "does not exist" and "is not yours"."""
    return ApiError(404, "not_found", f"There is no such {what}.")


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OperationalError):
        original = error.orig
        return isinstance(original, sqlite3.OperationalError) and "full" in str(original)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def from_exception(error: BaseException) -> ApiError:
    """What a person is told about an exception nobody expected."""
    if is_disk_full(error):
        return ApiError(507, "disk_full", DISK_FULL)
    return ApiError(
        500,
        "internal_error",
        "Something went wrong on the server. Try again; if it stays, give the administrator "
        "the x-request-id of this answer.",
    )


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return respond(error)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, message = _PLAIN.get(error.status_code, ("invalid_request", str(error.detail)))
    if error.status_code == 413:
        message = str(error.detail)
    return JSONResponse(
        error_body(error.status_code, code, message),
        status_code=error.status_code,
        headers=error.headers,
    )


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    # The rejected input is never echoed: it may be a password.
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        body = error_body(400, "invalid_json", "The body is not valid JSON. Correct it and retry.")
        return JSONResponse(body, status_code=400)
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(where) or None
    prefix = f"{param}: " if param else ""
    body = error_body(400, "invalid_value", f"{prefix}{first['msg']}.", param)
    return JSONResponse(body, status_code=400)


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
