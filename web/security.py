"""What every response carries, and the gate before the pages.

The pages are Streamlit's: they need inline styles, and components are imported from `blob:`
addresses that their own scripts made. Everything else comes from this origin alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.client import SESSION_COOKIE, Api, ApiError, PasswordChangeRequired, SignedOut

# The pages a sign-in may lead back to. Nothing else is ever the target of a redirect.
PAGES = ("chat", "search", "keys", "documents", "users", "monitoring")
_NEXT = re.compile(
    rf"/(?:{'|'.join(PAGES)})?(?:\?[a-z]{{1,16}}=[A-Za-z0-9_-]{{1,64}}"
    r"(?:&[a-z]{1,16}=[A-Za-z0-9_-]{1,64}){0,3})?"
)
_PAGE_PATHS = {"/", *(f"/{page}" for page in PAGES)}
IDENTITY_HEADER = "x-lectern-identity"
# Streamlit keeps uploads in memory and asks nobody who sends them; its own figures are open, too.
_UPLOADS = "/_stcore/upload_file/"
_HIDDEN = {"/_stcore/metrics"}


def safe_next(value: str | None) -> str:
    """`value` when it is the address of a page of ours, else the start page."""
    return value if value and _NEXT.fullmatch(value) else "/"


def identity(token: str) -> str:
    """A name for a session that does not give its token away (a truncated SHA-256)."""
    return hashlib.sha256(b"lectern web session\0" + token.encode()).hexdigest()[:32]


@cache
def _inline_script_hashes() -> str:
    """CSP sources for the inline scripts in Streamlit's page shell."""
    import streamlit

    shell = Path(streamlit.__file__).parent / "static" / "index.html"
    scripts = re.findall(r"<script>(.*?)</script>", shell.read_text("utf-8"), re.DOTALL)
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


@cache
def page_policy() -> str:
    """The content security policy of the Streamlit pages."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' blob: {_inline_script_hashes()}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "worker-src 'self' blob:",
            "manifest-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )


# The form pages need no script at all.
FORM_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


class SecurityHeaders:
    """Adds the headers to every HTTP response; a response's own policy is kept."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("content-security-policy", page_policy())
                headers["x-content-type-options"] = "nosniff"
                headers["x-frame-options"] = "DENY"
                headers["referrer-policy"] = "no-referrer"
                headers["cross-origin-opener-policy"] = "same-origin"
                headers["permissions-policy"] = "camera=(), microphone=(), geolocation=()"
            await send(message)

        await self._app(scope, receive, send_with_headers)


class SessionIdentity:
    """Tells Streamlit whose connection it is, so that it never resumes another person's session.

    Streamlit lets a dropped connection take up its session again when the identity is unchanged.
    The identity is a digest of the session cookie; the header a client sends is thrown away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            name = IDENTITY_HEADER.encode()
            headers = [(key, value) for key, value in scope["headers"] if key.lower() != name]
            token = HTTPConnection(scope).cookies.get(SESSION_COOKIE, "")
            headers.append((name, (identity(token) if token else "nobody").encode()))
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def _is_page(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] in {"GET", "HEAD"}
        and (scope["path"].rstrip("/") or "/") in _PAGE_PATHS
        and "text/html" in Headers(scope=scope).get("accept", "")
    )


class Gate:
    """Sends a browser without a valid session to the sign-in page before a page is loaded.

    This is a courtesy, not the protection: the backend checks the session at every call. Only
    uploads stay here in memory until a script passes them on, so strangers may not send any.
    """

    def __init__(self, app: ASGIApp, api: Callable[[HTTPConnection, str | None], Api]) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_page(scope):
            target = await self._redirect(HTTPConnection(scope))
            if target is not None:
                response = RedirectResponse(target, 303, {"cache-control": "no-store"})
                await response(scope, receive, send)
                return
        elif scope["type"] == "http" and await self._refuses(scope):
            await PlainTextResponse("Not found.", 404)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _refuses(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if path.rstrip("/") in _HIDDEN:
            return True
        if not path.startswith(_UPLOADS) or scope["method"] not in {"PUT", "POST", "DELETE"}:
            return False
        request = HTTPConnection(scope)
        token = request.cookies.get(SESSION_COOKIE)
        if not token:
            return True
        try:
            me = await run_in_threadpool(self._api(request, token).me)
        except ApiError:
            return True
        return bool(me["user"].get("must_change_password"))

    async def _redirect(self, request: HTTPConnection) -> str | None:
        query = request.url.query
        wanted = safe_next(request.url.path + (f"?{query}" if query else ""))
        sign_in = "/login" if wanted == "/" else f"/login?{urlencode({'next': wanted})}"
        token = request.cookies.get(SESSION_COOKIE)
        if not token:
            return sign_in
        try:
            me = await run_in_threadpool(self._api(request, token).me)
        except SignedOut:
            return sign_in
        except PasswordChangeRequired:
            return "/password"
        except ApiError:
            return None  # the page itself says what is wrong, and comes back by itself
        return "/password" if me["user"].get("must_change_password") else None
