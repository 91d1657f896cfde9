"""The ASGI application: Streamlit's pages with the form routes and the gate before them."""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection

from web.client import Api, make_pool
from web.forms import FormPages
from web.security import Gate, SecurityHeaders, SessionIdentity
from web.settings import WebSettings

SCRIPT = Path(__file__).parent / "entry" / "main.py"


def create_app(settings: WebSettings) -> st.App:
    """The application for one process. Streamlit allows one per process."""
    pool = make_pool()

    def api(request: HTTPConnection, token: str | None) -> Api:
        host = request.client.host if request.client else ""
        return Api(pool, settings.backend_url, lambda: token, client_host=host)

    return st.App(
        SCRIPT,
        routes=FormPages(api).routes(),
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(SessionIdentity),
            Middleware(Gate, api=api),
        ],
    )
