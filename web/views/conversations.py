"""The conversations of a course: list, new, rename, delete."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web.client import ApiError
from web.errors import sentence, shown
from web.markdown import as_text
from web.session import Viewer

_TITLE_LENGTH = 60
_TITLE_LIMIT = 200
_LISTED = 40


def _title_from(question: str) -> str:
    flat = " ".join(question.split())
    return flat if len(flat) <= _TITLE_LENGTH else flat[: _TITLE_LENGTH - 1] + "…"


def current(viewer: Viewer, course: dict[str, Any]) -> dict[str, Any] | None:
    """The conversation that the address names, with its messages; None for a new one."""
    wanted = st.query_params.get("conversation")
    if not wanted:
        return None
    try:
        conversation: dict[str, Any] = viewer.api.conversation(wanted)
    except ApiError as error:
        if error.status != 404:
            raise
        st.query_params.pop("conversation", None)
        st.toast(viewer.t("chat.gone"), icon=":material/info:")
        return None
    if str(conversation.get("course_id", course["id"])) != str(course["id"]):
        st.query_params.pop("conversation", None)
        return None
    return conversation


def start(viewer: Viewer, course: dict[str, Any], question: str) -> dict[str, Any]:
    """A new conversation named after its first question."""
    conversation = viewer.api.add_conversation(course["id"], _title_from(question))
    st.query_params["conversation"] = str(conversation["id"])
    return {"messages": [], **conversation}


def _open(conversation_id: Any) -> None:
    st.session_state.pop("open_passage", None)
    if conversation_id is None:
        st.query_params.pop("conversation", None)
    else:
        st.query_params["conversation"] = str(conversation_id)


def show_list(viewer: Viewer, course: dict[str, Any], conversation: dict[str, Any] | None) -> None:
    with st.sidebar, shown(viewer):
        st.button(
            viewer.t("chat.new"),
            key="new-conversation",
            icon=":material/edit_square:",
            width="stretch",
            on_click=_open,
            args=(None,),
            disabled=conversation is None,
        )
        entries = viewer.api.conversations(course["id"])
        if not entries:
            st.caption(viewer.t("chat.no_conversations"))
        for entry in entries[:_LISTED]:
            active = conversation is not None and entry["id"] == conversation["id"]
            st.button(
                as_text(entry["title"] or viewer.t("chat.untitled")),
                key=f"conversation-{entry['id']}",
                type="secondary" if active else "tertiary",
                width="stretch",
                on_click=_open,
                args=(entry["id"],),
            )
        if len(entries) > _LISTED:
            st.caption(viewer.t("chat.older", n=len(entries) - _LISTED))


def show_title(viewer: Viewer, conversation: dict[str, Any]) -> None:
    """The title of the conversation with rename and delete beside it."""
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        wrap=False,
        key="conversation-title",
    ):
        title = conversation.get("title") or viewer.t("chat.untitled")
        st.subheader(as_text(title), anchor=False, width="stretch")
        with st.popover("", icon=":material/more_horiz:", type="tertiary", key="conversation-menu"):
            name = st.text_input(
                viewer.t("chat.title_label"),
                value=conversation.get("title") or "",
                max_chars=_TITLE_LIMIT,
                key=f"title-{conversation['id']}",
            )
            st.button(
                viewer.t("chat.rename"),
                icon=":material/edit:",
                key="rename",
                disabled=not name.strip() or name == conversation.get("title"),
                on_click=_rename,
                args=(viewer, conversation["id"], name.strip()),
                width="stretch",
            )
            st.divider()
            st.button(
                viewer.t("chat.delete"),
                icon=":material/delete:",
                key="delete",
                on_click=_delete,
                args=(viewer, conversation["id"]),
                width="stretch",
            )
            st.caption(viewer.t("chat.delete_note"))


def _rename(viewer: Viewer, conversation_id: Any, title: str) -> None:
    try:
        viewer.api.rename_conversation(conversation_id, title)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")


def _delete(viewer: Viewer, conversation_id: Any) -> None:
    try:
        viewer.api.remove_conversation(conversation_id)
        st.query_params.pop("conversation", None)
        st.toast(viewer.t("chat.deleted"), icon=":material/delete:")
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")
