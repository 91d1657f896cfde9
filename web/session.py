"""Who is looking at the page: read anew at every run, kept nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from web.client import SESSION_COOKIE, Api, make_pool
from web.settings import WebSettings
from web.texts import LANGUAGE_COOKIE, choose_language, text


@dataclass(frozen=True)
class Viewer:
    """The signed-in person of this run, with the calls they may make and their language."""

    api: Api
    settings: WebSettings
    language: str
    user: dict[str, Any]
    courses: list[dict[str, Any]]
    model: dict[str, Any] = field(default_factory=dict)

    def t(self, key: str, **values: Any) -> str:
        return text(self.language, key, **values)

    @property
    def is_administrator(self) -> bool:
        return bool(self.user["role"] == "administrator")

    @property
    def is_teacher(self) -> bool:
        """Whether any course's documents are this person's to manage."""
        return (
            self.is_administrator
            or self.user["role"] == "teacher"
            or any(course.get("role") == "teacher" for course in self.courses)
        )

    def manages(self, course: dict[str, Any]) -> bool:
        return self.is_administrator or course.get("role") == "teacher"


@st.cache_resource(show_spinner=False)
def _pool() -> Any:
    return make_pool()


def token() -> str | None:
    """The session cookie of this connection; it goes into requests to the backend only."""
    return st.context.cookies.get(SESSION_COOKIE)


def language() -> str:
    return choose_language(
        st.context.cookies.get(LANGUAGE_COOKIE), st.context.headers.get("Accept-Language")
    )


def make_api(settings: WebSettings) -> Api:
    return Api(_pool(), settings.backend_url, token, client_host=st.context.ip_address or "")


def forget_other_person(user_id: Any) -> None:
    """Empty the session state when it was another person's.

    A connection that dropped may come back with another cookie; nothing of the person before may
    be shown then, not even a draft or a chosen course.
    """
    if st.session_state.get("user_id", user_id) != user_id:
        for key in list(st.session_state):
            del st.session_state[key]
    st.session_state["user_id"] = user_id


def load_viewer(settings: WebSettings) -> Viewer:
    """Ask the backend who this is. Raises ApiError (SignedOut, BackendUnreachable, ...)."""
    api = make_api(settings)
    me = api.me()
    forget_other_person(me["user"]["id"])
    return Viewer(
        api=api,
        settings=settings,
        language=language(),
        user=me["user"],
        courses=me.get("courses") or [],
        model=me.get("model") or {},
    )


Render = Callable[[Viewer], None]
