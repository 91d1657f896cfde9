"""A course's documents and members, for its teachers."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web.client import ApiError
from web.courses import heading, pick_course
from web.errors import sentence, shown
from web.markdown import as_text, safe
from web.session import Viewer
from web.settings import UPLOAD_LIMIT_MB
from web.views import members
from web.views.keys import day

# fmt: off
_SUFFIXES = [
    "md", "markdown", "txt", "html", "htm", "pdf", "ipynb", "rst", "tex", "sh", "sql",
    "c", "cc", "cpp", "h", "hpp", "py", "l", "y", "g4", "ll", "java", "js", "ts", "rs", "go",
]
# fmt: on
_UNDER_WAY = {"queued", "indexing"}
_STATES = {
    "queued": ("gray", ":material/schedule:"),
    "indexing": ("blue", ":material/sync:"),
    "ready": ("green", ":material/check:"),
    "failed": ("red", ":material/error:"),
}


def render(viewer: Viewer) -> None:
    with st.sidebar.popover(
        viewer.t("course.new"), icon=":material/add:", width="stretch", key="new-course"
    ):
        _new_course(viewer)
    course = pick_course(viewer, managed=True)
    if course is None:
        return
    heading(viewer.t("documents.title"), course)
    documents_tab, members_tab = st.tabs(
        [
            f":material/description: {viewer.t('documents.tab')}",
            f":material/group: {viewer.t('members.tab')}",
        ]
    )
    with documents_tab:
        _upload(viewer, course)
        _list(viewer, course)
    with members_tab:
        members.render(viewer, course)


def _new_course(viewer: Viewer) -> None:
    with st.form("create-course", clear_on_submit=True, border=False):
        name = st.text_input(viewer.t("course.name"), max_chars=120)
        slug = st.text_input(
            viewer.t("course.slug"), max_chars=60, help=viewer.t("course.slug_help")
        )
        if st.form_submit_button(viewer.t("course.create"), type="primary"):
            with shown(viewer):
                created = viewer.api.add_course(slug.strip(), name.strip())
                st.session_state["course_id"] = str(created["id"])
                st.session_state.pop("course_select", None)
                st.query_params.pop("course", None)
                st.rerun()


def _upload(viewer: Viewer, course: dict[str, Any]) -> None:
    outcome = st.session_state.pop("upload_outcome", None)
    with st.form("upload", clear_on_submit=True):
        files = st.file_uploader(
            viewer.t("documents.upload"),
            type=_SUFFIXES,
            accept_multiple_files=True,
            max_upload_size=UPLOAD_LIMIT_MB,
            help=viewer.t("documents.kinds"),
        )
        sent = st.form_submit_button(
            viewer.t("documents.send"), type="primary", icon=":material/upload:"
        )
    if sent:
        st.session_state["upload_outcome"] = _send(viewer, course, files)
        st.rerun()
    if outcome:
        for failure in outcome["failed"]:
            st.error(failure, icon=":material/error:")
        if outcome["sent"]:
            st.success(viewer.t("documents.sent", n=outcome["sent"]), icon=":material/check:")
        elif not outcome["failed"]:
            st.warning(viewer.t("documents.choose"), icon=":material/info:")


def _send(viewer: Viewer, course: dict[str, Any], files: list[Any]) -> dict[str, Any]:
    failed: list[str] = []
    with st.status(viewer.t("documents.sending"), expanded=False):
        for file in files:
            try:
                viewer.api.add_document(course["id"], file.name, file.getvalue(), file.type or "")
            except ApiError as error:
                if error.status == 401:
                    raise
                failed.append(f"**{as_text(file.name)}**: {sentence(viewer, error)}")
    return {"sent": len(files) - len(failed), "failed": failed}


def _list(viewer: Viewer, course: dict[str, Any]) -> None:
    with shown(viewer):
        documents = viewer.api.documents(course["id"])
        waiting = any(document["state"] in _UNDER_WAY for document in documents)

        # Only while something is under way is the list looked at again by itself.
        @st.fragment(run_every=1.5 if waiting else None)
        def listing() -> None:
            with shown(viewer):
                current = viewer.api.documents(course["id"])
                if waiting and not any(entry["state"] in _UNDER_WAY for entry in current):
                    st.rerun()
                _rows(viewer, course, current)

        listing()


def _rows(viewer: Viewer, course: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    if not documents:
        st.info(viewer.t("documents.none"), icon=":material/upload_file:")
        return
    ready = sum(1 for document in documents if document["state"] == "ready")
    passages = sum(int(document.get("passages") or 0) for document in documents)
    st.caption(
        viewer.t("documents.summary", n=len(documents), ready=ready, passages=f"{passages:,}")
    )
    for document in documents:
        _row(viewer, course, document)


def size(count: int | None) -> str:
    """A number of bytes for people."""
    value = float(count or 0)
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GB"


def _row(viewer: Viewer, course: dict[str, Any], document: dict[str, Any]) -> None:
    state = document["state"]
    colour, icon = _STATES.get(state, ("gray", ":material/help:"))
    with st.container(border=True, key=f"document-{document['id']}", gap="small"):
        with st.container(
            horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
        ):
            with st.container(gap=None, width="content"):
                st.markdown(
                    f"**{as_text(document['name'])}** "
                    f":{colour}-badge[{icon} {viewer.t(f'documents.state_{state}')}]"
                )
                st.caption(
                    viewer.t(
                        "documents.details",
                        size=size(document.get("bytes")),
                        passages=document.get("passages") or 0,
                        date=day(document.get("uploaded_at"), with_time=True),
                    )
                )
            with st.container(horizontal=True, width="content", gap="small"):
                if state == "failed":
                    st.button(
                        viewer.t("documents.retry"),
                        key=f"retry-{document['id']}",
                        icon=":material/refresh:",
                        on_click=_act,
                        args=(viewer, "retry_document", course["id"], document["id"]),
                    )
                with st.popover("", icon=":material/delete:", key=f"remove-{document['id']}"):
                    st.markdown(viewer.t("documents.delete_ask", name=as_text(document["name"])))
                    st.button(
                        viewer.t("documents.delete"),
                        key=f"delete-{document['id']}",
                        type="primary",
                        on_click=_act,
                        args=(viewer, "remove_document", course["id"], document["id"]),
                    )
        if state == "indexing":
            st.progress(min(1.0, max(0.0, float(document.get("progress") or 0.0))))
        elif state == "failed":
            reason = document.get("error") or viewer.t("documents.failed")
            st.error(safe(str(reason)), icon=":material/error:")


def _act(viewer: Viewer, action: str, course_id: Any, document_id: Any) -> None:
    try:
        getattr(viewer.api, action)(course_id, document_id)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")
