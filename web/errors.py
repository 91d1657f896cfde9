"""Refusals and failures as sentences on the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from web.client import ApiError, BackendUnreachable, PasswordChangeRequired, SignedOut
from web.markdown import safe
from web.session import Viewer
from web.texts import catalogue


def sentence(viewer: Viewer, error: ApiError) -> str:
    """What to tell people: our own words for a known code, else the backend's sentence."""
    if isinstance(error, BackendUnreachable):
        return viewer.t("error.backend_unreachable")
    if error.status == 429 and error.retry_after is not None:
        return viewer.t("error.wait", seconds=error.retry_after)
    if f"error.{error.code}" in catalogue():
        return viewer.t(f"error.{error.code}")
    return safe(error.message)


@contextmanager
def shown(viewer: Viewer) -> Iterator[None]:
    """Show an ApiError raised inside as a sentence; a lost session goes on to the sign-in page."""
    try:
        yield
    except (SignedOut, PasswordChangeRequired):
        raise
    except ApiError as error:
        st.error(sentence(viewer, error), icon=":material/error:")
