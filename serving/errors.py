"""Errors of the serving engine. Every message is a sentence: what happened and what to do."""

from __future__ import annotations


class LecternError(Exception):
    """Base of every error that the engine raises on purpose."""


class ConfigError(LecternError):
    """A setting is wrong. `flag` names the command-line flag to change, such as `--page-size`."""

    def __init__(self, message: str, flag: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.flag = flag


class ModelError(LecternError):
    """A model folder is missing, damaged or of a kind that is not supported."""


class InvalidRequestError(LecternError):
    """A request cannot be served as it stands.

    `param` names the field of the request, `code` is stable for programs, `status` is the HTTP
    status that the API answers with.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class ContextLengthError(InvalidRequestError):
    """A request does not fit into the context, or into all pages of the KV cache together."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, code="context_length_exceeded", status=400)


class OverloadedError(LecternError):
    """A request was refused before its first token: too many wait. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class EngineDeadError(LecternError):
    """A process of the engine ended, so this request cannot be finished."""
