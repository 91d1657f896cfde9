"""Who is asking. Every route of the page depends on one of these."""

from typing import Annotated

from fastapi import Depends, Request

from backend.accounts import sessions
from backend.accounts.models import User
from backend.context import ContextDep
from backend.errors import ApiError
from backend.settings import Settings


def _peer(request: Request) -> str:
    return request.client.host if request.client else ""


def is_neighbour(request: Request, settings: Settings) -> bool:
    """Whether a program of ours asks (by default: of this machine), not a proxy for others."""
    proxied = "x-forwarded-for" in request.headers or "forwarded" in request.headers
    return not proxied and settings.trusts(_peer(request))


def client_address(request: Request, settings: Settings) -> str:
    """The caller's address; of X-Forwarded-For, from a neighbour alone, the last entry."""
    peer = _peer(request)
    forwarded = request.headers.get("x-forwarded-for", "")
    if forwarded.strip() and settings.trusts(peer):
        return forwarded.rsplit(",", 1)[-1].strip()[:64]
    return peer or "unknown"


def session_token(request: Request) -> str | None:
    return request.cookies.get(sessions.COOKIE)


def _refuse_foreign_pages(request: Request) -> None:
    # Cookies ignore ports: a page served by another program on the same host could post here
    # with the user's cookie. Such a request carries an Origin; our own web server sends none.
    origin = request.headers.get("origin")
    if origin is None or request.method in ("GET", "HEAD", "OPTIONS"):
        return
    if origin.rsplit("//", 1)[-1] != request.headers.get("host"):
        raise ApiError(403, "foreign_origin", "Requests from other sites' pages are refused.")


def signed_in(request: Request, context: ContextDep) -> User:
    """Any live session, also one that must still change its password."""
    token = session_token(request)
    user = None
    if token:
        with context.database.read() as session:
            user = sessions.find_user(session, token)
    if user is None:
        raise ApiError(401, "not_signed_in", "You are not signed in. Sign in and try again.")
    _refuse_foreign_pages(request)
    return user


SignedIn = Annotated[User, Depends(signed_in)]


def current_user(user: SignedIn) -> User:
    if user.must_change_password:
        raise ApiError(
            403, "password_change_required", "Change your one-time password before going on."
        )
    return user


CurrentUser = Annotated[User, Depends(current_user)]


def administrator(user: CurrentUser) -> User:
    if user.role != "administrator":
        raise ApiError(403, "permission_denied", "Only an administrator may do this.")
    return user


Administrator = Annotated[User, Depends(administrator)]


def teacher(user: CurrentUser) -> User:
    if user.role not in ("teacher", "administrator"):
        raise ApiError(403, "permission_denied", "Only a teacher or an administrator may do this.")
    return user


Teacher = Annotated[User, Depends(teacher)]
