"""Sign-in, sign-out, change of password and language: plain form pages without any script.

A Streamlit script cannot set a cookie, so everything that sets one is here. Every POST carries a
token that must equal the one in the `lectern_csrf` cookie, and its Origin must be this origin.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from web.client import SESSION_COOKIE, Api, ApiError, BackendUnreachable, SignedOut
from web.security import FORM_POLICY, safe_next
from web.texts import LANGUAGE_COOKIE, LANGUAGES, choose_language, text

CSRF_COOKIE = "lectern_csrf"
_YEAR = 365 * 24 * 3600
_FOLDER = Path(__file__).parent
_ASSETS = {"forms.css": "text/css", "mark.svg": "image/svg+xml"}
MIN_PASSWORD_LENGTH = 10
# A sign-in form is a few hundred bytes; nothing larger is read.
_FORM_LIMIT = 16 * 1024

ApiFactory = Callable[[HTTPConnection, str | None], Api]


def language_of(request: HTTPConnection) -> str:
    return choose_language(
        request.cookies.get(LANGUAGE_COOKIE), request.headers.get("accept-language")
    )


def _expiry_seconds(expires_at: str | None) -> int | None:
    """Seconds until an ISO 8601 time (UTC when it names no zone); None for a browser session."""
    if not expires_at:
        return None
    moment = datetime.fromisoformat(expires_at)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int((moment - datetime.now(UTC)).total_seconds()))


def _is_same_origin(request: Request) -> bool:
    """Whether a form was posted by a page of ours, as far as the browser says.

    Under our no-referrer policy browsers send `Origin: null` with a form, so Sec-Fetch-Site
    decides where it exists.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = request.headers.get("origin", "null")
    return origin == "null" or origin.partition("://")[2] == request.headers.get("host", "")


class FormPages:
    """The form routes; `api` makes an `Api` for a request and a token."""

    def __init__(self, api: ApiFactory) -> None:
        self._api = api
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"), autoescape=True
        )

    def routes(self) -> list[Route]:
        return [
            Route("/login", self.login_page, methods=["GET"]),
            Route("/login", self.login, methods=["POST"]),
            Route("/logout", self.logout_page, methods=["GET"]),
            Route("/logout", self.logout, methods=["POST"]),
            Route("/password", self.password_page, methods=["GET"]),
            Route("/password", self.change_password, methods=["POST"]),
            Route("/language", self.language, methods=["GET"]),
            Route("/assets/{name}", self.asset, methods=["GET"]),
        ]

    # -- pieces -----------------------------------------------------------------------------

    def _set_cookie(
        self, request: Request, response: Response, name: str, value: str, max_age: int | None
    ) -> None:
        response.set_cookie(
            name,
            value,
            max_age=max_age,
            path="/",
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )

    def _page(
        self, request: Request, template: str, *, status: int = 200, **values: Any
    ) -> HTMLResponse:
        language = language_of(request)
        csrf = request.cookies.get(CSRF_COOKIE, "")
        fresh = len(csrf) < 32
        if fresh:
            csrf = secrets.token_urlsafe(32)

        def t(key: str, **fields: Any) -> str:
            return text(language, key, **fields)

        html = self._templates.get_template(template).render(
            t=t, language=language, languages=LANGUAGES, csrf=csrf, path=request.url.path, **values
        )
        response = HTMLResponse(
            html,
            status,
            {
                "content-security-policy": FORM_POLICY,
                "cache-control": "no-store",
                "vary": "Cookie, Accept-Language",
            },
        )
        if fresh:
            self._set_cookie(request, response, CSRF_COOKIE, csrf, None)
        return response

    async def _form(self, request: Request) -> FormData | None:
        """The posted form, or None when it is too large or its token is not the cookie's."""
        size = request.headers.get("content-length", "")
        if not size.isdigit() or int(size) > _FORM_LIMIT or not _is_same_origin(request):
            return None
        form = await request.form(max_files=0, max_fields=10)
        cookie = request.cookies.get(CSRF_COOKIE, "")
        sent = str(form.get("csrf") or "")
        if len(cookie) < 32 or not hmac.compare_digest(cookie.encode(), sent.encode()):
            return None
        return form

    def _signed_in(self, request: Request, answer: dict[str, Any], target: str) -> Response:
        """Set the new session's cookie and a new form token; the old ones are worth nothing."""
        response = RedirectResponse(target, 303, {"cache-control": "no-store"})
        max_age = _expiry_seconds(answer.get("expires_at"))
        self._set_cookie(request, response, SESSION_COOKIE, answer["token"], max_age)
        self._set_cookie(request, response, CSRF_COOKIE, secrets.token_urlsafe(32), None)
        return response

    async def _end_session(self, request: Request) -> None:
        token = request.cookies.get(SESSION_COOKIE)
        if not token:
            return
        try:
            await run_in_threadpool(self._api(request, token).logout)
        except SignedOut:
            return  # it had ended already

    @staticmethod
    def _sentence(language: str, error: ApiError) -> str:
        if isinstance(error, BackendUnreachable):
            return text(language, "error.backend_unreachable")
        if error.code == "invalid_credentials":
            return text(language, "login.wrong")
        if error.status == 429:
            return text(language, "login.wait", seconds=error.retry_after or 30)
        return error.message

    # -- sign in and out --------------------------------------------------------------------

    async def login_page(self, request: Request) -> Response:
        return self._page(
            request, "login.html", next=safe_next(request.query_params.get("next")), username=""
        )

    async def login(self, request: Request) -> Response:
        language = language_of(request)
        form = await self._form(request)
        if form is None:
            return self._page(
                request,
                "login.html",
                status=403,
                next="/",
                username="",
                error=text(language, "form.stale"),
            )
        target = safe_next(str(form.get("next") or ""))
        username = str(form.get("username") or "").strip()
        password = str(form.get("password") or "")
        try:
            api = self._api(request, None)
            answer = await run_in_threadpool(api.login, username, password)
            # A new session replaces the one this browser had, which ends here and now.
            await self._end_session(request)
        except ApiError as error:
            response = self._page(
                request,
                "login.html",
                status=error.status or 503,
                next=target,
                username=username,
                error=self._sentence(language, error),
            )
            if error.retry_after is not None:
                response.headers["retry-after"] = str(error.retry_after)
            return response
        if answer["user"].get("must_change_password"):
            target = "/password"
        return self._signed_in(request, answer, target)

    async def logout_page(self, request: Request) -> Response:
        return self._page(request, "logout.html")

    async def logout(self, request: Request) -> Response:
        if await self._form(request) is None:
            # The token is stale, for instance after signing in again in another tab: ask.
            return self._page(request, "logout.html", status=403)
        try:
            await self._end_session(request)
        except ApiError as error:
            sentence = self._sentence(language_of(request), error)
            return self._page(request, "logout.html", status=503, error=sentence)
        response = RedirectResponse("/login", 303, {"cache-control": "no-store"})
        secure = request.url.scheme == "https"
        for name in (SESSION_COOKIE, CSRF_COOKIE):
            response.delete_cookie(name, path="/", httponly=True, samesite="lax", secure=secure)
        return response

    # -- change of password -----------------------------------------------------------------

    async def password_page(self, request: Request) -> Response:
        token = request.cookies.get(SESSION_COOKIE)
        if not token:
            return RedirectResponse("/login", 303)
        forced = False
        try:
            me = await run_in_threadpool(self._api(request, token).me)
            forced = bool(me["user"].get("must_change_password"))
        except SignedOut:
            return RedirectResponse("/login", 303)
        except ApiError as error:
            sentence = self._sentence(language_of(request), error)
            return self._page(request, "password.html", status=503, forced=False, error=sentence)
        return self._page(request, "password.html", forced=forced, least=MIN_PASSWORD_LENGTH)

    async def change_password(self, request: Request) -> Response:
        token = request.cookies.get(SESSION_COOKIE)
        if not token:
            return RedirectResponse("/login", 303)
        language = language_of(request)
        form = await self._form(request)
        sentence, status = text(language, "form.stale"), 403
        forced = False
        if form is not None:
            forced = form.get("forced") == "yes"
            new = str(form.get("new") or "")
            if new != str(form.get("again") or ""):
                sentence, status = text(language, "password.differ"), 400
            else:
                try:
                    answer = await run_in_threadpool(
                        self._api(request, token).change_password,
                        str(form.get("current") or ""),
                        new,
                    )
                    return self._signed_in(request, answer, "/")
                except SignedOut:
                    return RedirectResponse("/login", 303)
                except ApiError as error:
                    sentence, status = self._sentence(language, error), error.status or 503
                    if error.code == "invalid_credentials":
                        sentence = text(language, "password.wrong")
        return self._page(
            request,
            "password.html",
            status=status,
            forced=forced,
            least=MIN_PASSWORD_LENGTH,
            error=sentence,
        )

    # -- language and files -----------------------------------------------------------------

    async def language(self, request: Request) -> Response:
        """Remember the language; harmless when another site causes it, hence a GET."""
        target = request.query_params.get("next")
        target = target if target in {"/login", "/password", "/logout"} else safe_next(target)
        response = RedirectResponse(target, 303, {"cache-control": "no-store"})
        wanted = request.query_params.get("to", "")
        if wanted in LANGUAGES:
            self._set_cookie(request, response, LANGUAGE_COOKIE, wanted, _YEAR)
        return response

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        kind = _ASSETS.get(name)
        if kind is None:
            return Response("Not found.", 404, media_type="text/plain")
        headers = {"cache-control": "public, max-age=3600"}
        return FileResponse(_FOLDER / "assets" / name, media_type=kind, headers=headers)
