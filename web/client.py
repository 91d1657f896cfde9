"""The backend's HTTP interface as the pages use it.

An `Api` asks for the session's token at every call and keeps none. The
connection pool beneath is shared by everybody, so it must not remember cookies: a `Set-Cookie` of
one person's answer would be sent with the next person's call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2

from web.sse import Event, parse_events

SESSION_COOKIE = "lectern_session"
_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
# The backend sends a ping at least every 5 s while an answer waits or runs.
_STREAM_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)
_UPLOAD_TIMEOUT = httpx2.Timeout(120.0, connect=5.0)


class ApiError(Exception):
    """The backend refused or could not be asked. `code` is stable, `message` a sentence."""

    def __init__(
        self, message: str, *, status: int = 0, code: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.retry_after = retry_after


class SignedOut(ApiError):
    """The session is missing, expired or revoked."""


class PasswordChangeRequired(ApiError):
    """The account may do nothing until its password has been changed."""


class BackendUnreachable(ApiError):
    """No answer from the backend."""


def make_pool() -> httpx2.Client:
    """A connection pool without a memory for cookies, proxies or redirects."""
    jar = CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
    return httpx2.Client(
        timeout=_TIMEOUT,
        cookies=jar,
        trust_env=False,
        follow_redirects=False,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
    )


def _retry_after(response: httpx2.Response) -> int | None:
    value = response.headers.get("retry-after", "")
    return int(value) if value.isdigit() else None


def error_from(response: httpx2.Response) -> ApiError:
    """The exception for a refusal; the body must have been read."""
    message, code = "", ""
    try:
        error = response.json()["error"]
        message, code = str(error.get("message") or ""), str(error.get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"The backend answered with status {response.status_code}."
    kind: type[ApiError] = ApiError
    if code == "password_change_required":
        kind = PasswordChangeRequired
    elif response.status_code == 401 and code != "invalid_credentials":
        kind = SignedOut
    return kind(message, status=response.status_code, code=code, retry_after=_retry_after(response))


_SEGMENT = re.compile(r"[A-Za-z0-9_-]{1,128}")


def _id(value: Any) -> str:
    """`value` as one segment of a path; ids also come from the address bar."""
    segment = str(value)
    if not _SEGMENT.fullmatch(segment):
        raise ApiError("There is nothing with this id.", status=404, code="not_found")
    return segment


class Api:
    """Calls of one signed-in person (or of nobody, for signing in)."""

    def __init__(
        self,
        pool: httpx2.Client,
        base_url: str,
        token: Callable[[], str | None],
        *,
        client_host: str = "",
    ) -> None:
        self._pool = pool
        self._base = base_url.rstrip("/")
        self._token = token
        self._client_host = client_host

    def _headers(self, accept: str = "application/json") -> dict[str, str]:
        headers = {"accept": accept}
        token = self._token()
        if token:
            headers["cookie"] = f"{SESSION_COOKIE}={token}"
        if self._client_host:
            headers["x-forwarded-for"] = self._client_host
        return headers

    def _call(self, method: str, path: str, **options: Any) -> Any:
        options.setdefault("timeout", _TIMEOUT)
        try:
            response = self._pool.request(
                method, self._base + path, headers=self._headers(), **options
            )
        except httpx2.TransportError as error:
            raise BackendUnreachable(str(error), code="backend_unreachable") from error
        if response.status_code >= 400:
            raise error_from(response)
        if response.status_code == 204 or not response.content:
            return None
        return response.json()

    def _events(
        self, method: str, path: str, **options: Any
    ) -> AbstractContextManager[Iterator[Event]]:
        """A stream that is opened on entering; the token is taken now, in the caller's thread."""
        headers = self._headers("text/event-stream")

        @contextmanager
        def opened() -> Iterator[Iterator[Event]]:
            try:
                with self._pool.stream(
                    method, self._base + path, headers=headers, timeout=_STREAM_TIMEOUT, **options
                ) as response:
                    if response.status_code >= 400:
                        response.read()
                        raise error_from(response)
                    yield parse_events(response.iter_lines())
            except httpx2.TransportError as error:
                raise BackendUnreachable(str(error), code="backend_unreachable") from error

        return opened()

    # -- the account ------------------------------------------------------------------------

    def login(self, username: str, password: str) -> Any:
        return self._call(
            "POST", "/api/auth/login", json={"username": username, "password": password}
        )

    def logout(self) -> None:
        self._call("POST", "/api/auth/logout")

    def change_password(self, current: str, new: str) -> Any:
        body = {"current_password": current, "new_password": new}
        return self._call("POST", "/api/auth/password", json=body)

    def me(self) -> Any:
        return self._call("GET", "/api/me")

    # -- users ------------------------------------------------------------------------------

    def users(self) -> Any:
        return self._call("GET", "/api/users")

    def add_user(self, username: str, display_name: str, role: str) -> Any:
        body = {"username": username, "display_name": display_name, "role": role}
        return self._call("POST", "/api/users", json=body)

    def reset_user(self, user_id: Any) -> Any:
        return self._call("POST", f"/api/users/{_id(user_id)}/reset")

    def change_user(self, user_id: Any, **fields: Any) -> Any:
        return self._call("PATCH", f"/api/users/{_id(user_id)}", json=fields)

    # -- courses ----------------------------------------------------------------------------

    def add_course(self, slug: str, name: str) -> Any:
        return self._call("POST", "/api/courses", json={"slug": slug, "name": name})

    def members(self, course: Any) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/members")

    def add_member(self, course: Any, username: str, role: str) -> Any:
        body = {"username": username, "role": role}
        return self._call("POST", f"/api/courses/{_id(course)}/members", json=body)

    def remove_member(self, course: Any, user_id: Any) -> None:
        self._call("DELETE", f"/api/courses/{_id(course)}/members/{_id(user_id)}")

    # -- documents --------------------------------------------------------------------------

    def documents(self, course: Any) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/documents")

    def add_document(self, course: Any, name: str, content: bytes, kind: str) -> Any:
        return self._call(
            "POST",
            f"/api/courses/{_id(course)}/documents",
            files={"file": (name, content, kind or "application/octet-stream")},
            timeout=_UPLOAD_TIMEOUT,
        )

    def remove_document(self, course: Any, document: Any) -> None:
        self._call("DELETE", f"/api/courses/{_id(course)}/documents/{_id(document)}")

    def retry_document(self, course: Any, document: Any) -> Any:
        return self._call("POST", f"/api/courses/{_id(course)}/documents/{_id(document)}/retry")

    def document_text(self, course: Any, document: Any) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/documents/{_id(document)}/text")

    def search(self, course: Any, query: str, k: int = 8) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/search", params={"q": query, "k": k})

    def passage(self, course: Any, passage: Any) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/passages/{_id(passage)}")

    # -- conversations ----------------------------------------------------------------------

    def conversations(self, course: Any) -> Any:
        return self._call("GET", f"/api/courses/{_id(course)}/conversations")

    def add_conversation(self, course: Any, title: str) -> Any:
        return self._call(
            "POST", f"/api/courses/{_id(course)}/conversations", json={"title": title}
        )

    def conversation(self, conversation: Any) -> Any:
        return self._call("GET", f"/api/conversations/{_id(conversation)}")

    def rename_conversation(self, conversation: Any, title: str) -> Any:
        return self._call("PATCH", f"/api/conversations/{_id(conversation)}", json={"title": title})

    def remove_conversation(self, conversation: Any) -> None:
        self._call("DELETE", f"/api/conversations/{_id(conversation)}")

    def stop(self, conversation: Any) -> None:
        self._call("POST", f"/api/conversations/{_id(conversation)}/stop")

    def ask(self, conversation: Any, question: str) -> AbstractContextManager[Iterator[Event]]:
        path = f"/api/conversations/{_id(conversation)}/messages"
        return self._events("POST", path, json={"content": question})

    def attach(self, conversation: Any) -> AbstractContextManager[Iterator[Event]]:
        return self._events("GET", f"/api/conversations/{_id(conversation)}/stream")

    # -- keys, usage, monitoring ------------------------------------------------------------

    def keys(self) -> Any:
        return self._call("GET", "/api/keys")

    def add_key(self, name: str, expires_in_days: int | None) -> Any:
        body: dict[str, Any] = {"name": name}
        if expires_in_days is not None:
            body["expires_in_days"] = expires_in_days
        return self._call("POST", "/api/keys", json=body)

    def revoke_key(self, key: Any) -> None:
        self._call("DELETE", f"/api/keys/{_id(key)}")

    def usage(self, days: int = 30) -> Any:
        return self._call("GET", "/api/usage", params={"days": days})

    def overview(self) -> Any:
        return self._call("GET", "/api/admin/overview")
