"""Search in the documents of a course."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web import passages
from web.courses import heading, pick_course
from web.errors import shown
from web.markdown import as_text, safe
from web.session import Viewer

_RESULTS = 8


def render(viewer: Viewer) -> None:
    course = pick_course(viewer)
    if course is None:
        return
    heading(viewer.t("search.title"), course)
    query = st.text_input(
        viewer.t("search.label"),
        key="search_query",
        type="search",
        placeholder=viewer.t("search.placeholder"),
        label_visibility="collapsed",
        icon=":material/search:",
        max_chars=500,
    )
    passages.show_open_passage(viewer)
    if not query or not query.strip():
        st.caption(viewer.t("search.hint"))
        return
    with shown(viewer):
        with st.spinner(viewer.t("search.running")):
            found = viewer.api.search(course["id"], query.strip(), _RESULTS)["passages"]
        if not found:
            st.info(viewer.t("search.nothing"), icon=":material/search_off:")
            return
        st.caption(viewer.t("search.found", n=len(found)))
        for rank, passage in enumerate(found, start=1):
            _show(viewer, course, rank, passage)


def _show(viewer: Viewer, course: dict[str, Any], rank: int, passage: dict[str, Any]) -> None:
    with st.container(border=True, key=f"result-{rank}"):
        with st.container(
            horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
        ):
            st.markdown(
                f":blue-badge[{rank}] **{as_text(passages.document_name(passage))}**",
                width="content",
            )
            st.button(
                viewer.t("search.open"),
                key=f"open-{rank}",
                type="tertiary",
                icon=":material/menu_book:",
                on_click=passages.open_passage,
                args=(course["id"], passage["id"]),
            )
        where = passages.place(viewer, passage)
        if where:
            st.caption(as_text(where))
        st.markdown(safe(_without_headings(passage["text"])))


def _without_headings(text: str) -> str:
    """Headings inside a passage as bold lines: a result is no chapter of this page."""
    lines, code = [], False
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
        if not code and line.startswith("#"):
            line = f"**{line.lstrip('#').strip()}**\n"
        lines.append(line)
    return "\n".join(lines)
