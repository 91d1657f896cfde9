"""Choosing the course that a page is about."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web.markdown import as_text
from web.session import Viewer


def _chosen(parameters_to_drop: tuple[str, ...]) -> None:
    st.session_state["course_id"] = st.session_state["course_select"]
    for name in parameters_to_drop:
        st.query_params.pop(name, None)


def pick_course(
    viewer: Viewer, *, managed: bool = False, drop: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """The course chosen in the sidebar, or None (with a word on what to do) when there is none.

    `managed` offers only courses whose documents this person manages; `drop` names the query
    parameters that a change of course ends.
    """
    courses = [c for c in viewer.courses if not managed or viewer.manages(c)]
    if not courses:
        st.info(viewer.t("course.none_managed" if managed else "course.none"), icon="📚")
        return None
    by_id = {str(course["id"]): course for course in courses}
    wanted = st.query_params.get("course") or st.session_state.get("course_id")
    ids = list(by_id)
    if wanted not in by_id:
        wanted = st.session_state.get("course_id")
    if st.session_state.get("course_select") not in by_id:
        st.session_state.pop("course_select", None)
    chosen = st.sidebar.selectbox(
        viewer.t("course.pick"),
        ids,
        index=ids.index(wanted) if wanted in by_id else 0,
        format_func=lambda course_id: as_name(by_id[course_id]),
        key="course_select",
        on_change=_chosen,
        args=(("course", *drop),),
    )
    st.session_state["course_id"] = chosen
    st.query_params["course"] = chosen
    return by_id[chosen]


def as_name(course: dict[str, Any]) -> str:
    return str(course.get("name") or course["slug"])


def heading(title: str, course: dict[str, Any] | None = None) -> None:
    """The page's title with the course beneath."""
    st.title(title, anchor=False)
    if course is not None:
        st.caption(as_text(as_name(course)))
