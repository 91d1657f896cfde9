"""Passages on the page: their names, the list under an answer, the dialog at their place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import streamlit as st

from web import components
from web.errors import shown
from web.markdown import as_text
from web.session import Viewer

# How much of a document is shown around a passage when the whole document is asked for.
_WHOLE_LIMIT = 200_000
_SNIPPET = 180


def place(viewer: Viewer, passage: dict[str, Any]) -> str:
    """Heading path and page of a passage, as plain text; empty when it has neither."""
    parts = []
    if passage.get("heading_path"):
        parts.append(" › ".join(passage["heading_path"]))
    if passage.get("page"):
        parts.append(viewer.t("passage.page", page=passage["page"]))
    return " · ".join(parts)


def document_name(passage: dict[str, Any]) -> str:
    return str(passage.get("title") or passage.get("document") or "?")


def open_passage(course_id: Any, passage_id: Any, number: int | None = None) -> None:
    """Ask for the dialog of a passage; it stays open over reruns until it is dismissed."""
    st.session_state["open_passage"] = {"course": course_id, "id": passage_id, "n": number}


def _dismiss() -> None:
    st.session_state.pop("open_passage", None)


def show_open_passage(viewer: Viewer) -> None:
    """Show the dialog when one was asked for."""
    wanted = st.session_state.get("open_passage")
    if wanted is None:
        return
    with shown(viewer):
        passage = viewer.api.passage(wanted["course"], wanted["id"])
        number = f"[{wanted['n']}] " if wanted["n"] else ""
        title = as_text(number + document_name(passage))
        st.dialog(title, width="medium", icon=":material/menu_book:", on_dismiss=_dismiss)(_dialog)(
            viewer, wanted["course"], passage
        )


def _dialog(viewer: Viewer, course_id: Any, passage: dict[str, Any]) -> None:
    where = place(viewer, passage)
    file = passage.get("document") or ""
    details = " · ".join(part for part in (file, where) if part and part != passage.get("title"))
    if details:
        st.caption(as_text(details))
    before, text, after = passage.get("before") or "", passage["text"], passage.get("after") or ""
    whole = st.toggle(viewer.t("passage.whole"), key="whole_document")
    if whole:
        with shown(viewer):
            full = str(viewer.api.document_text(course_id, passage["document_id"])["text"])
            start, end = passage["start"], passage["end"]
            before = full[max(0, start - _WHOLE_LIMIT) : start]
            text = full[start:end]
            after = full[end : end + _WHOLE_LIMIT]
    key = f"passage-{passage['id']}-{'whole' if whole else 'near'}"
    components.passage_view(before, text, after, viewer.t("passage.marked"), key)


def _label(viewer: Viewer, passage: dict[str, Any]) -> str:
    where = passage["heading_path"][-1] if passage.get("heading_path") else ""
    if passage.get("page"):
        where = f"{where} · {viewer.t('passage.page', page=passage['page'])}".strip(" ·")
    name = document_name(passage)
    return f"{name} › {where}" if where and where != name else name


def show_found(
    viewer: Viewer,
    course_id: Any,
    message: str,
    passages: Sequence[dict[str, Any]],
    cited: Collection[int],
    *,
    answering: bool,
) -> None:
    """The passages of an answer: the cited ones as a row of buttons, all of them in an expander."""
    if not passages:
        return
    in_answer = [passage for passage in passages if passage["n"] in cited]
    if in_answer and not answering:
        st.caption(viewer.t("chat.sources"))
        with st.container(horizontal=True, gap="small", key=f"sources-{message}"):
            for passage in in_answer:
                st.button(
                    f":blue-badge[{passage['n']}] {as_text(_label(viewer, passage))}",
                    key=f"cite-{message}-{passage['n']}",
                    help=as_text(place(viewer, passage)) or None,
                    on_click=open_passage,
                    args=(course_id, passage["id"], passage["n"]),
                )
    title = viewer.t("chat.found", n=len(passages))
    icon = ":material/find_in_page:"
    with st.expander(title, expanded=answering, icon=icon, key=f"found-{message}-{answering}"):
        for passage in passages:
            st.button(
                f":blue-badge[{passage['n']}] {as_text(_label(viewer, passage))}",
                key=f"found-{message}-{passage['n']}",
                type="tertiary",
                on_click=open_passage,
                args=(course_id, passage["id"], passage["n"]),
            )
            snippet = " ".join(passage["text"].split())
            more = "…" if len(snippet) > _SNIPPET else ""
            st.caption(as_text(snippet[:_SNIPPET]) + more)
