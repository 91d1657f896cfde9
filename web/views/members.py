"""Who belongs to a course."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web.client import ApiError
from web.errors import sentence, shown
from web.markdown import as_text
from web.session import Viewer

_ROLES = ("student", "teacher")


def render(viewer: Viewer, course: dict[str, Any]) -> None:
    with st.form("add-member", clear_on_submit=True):
        name, role, submit = st.columns([3, 2, 1.4], vertical_alignment="bottom")
        username = name.text_input(viewer.t("members.username"), max_chars=150)
        chosen = role.selectbox(
            viewer.t("members.role"), _ROLES, format_func=lambda code: viewer.t(f"role.{code}")
        )
        if (
            submit.form_submit_button(viewer.t("members.add"), type="primary", width="stretch")
            and username.strip()
        ):
            with shown(viewer):
                viewer.api.add_member(course["id"], username.strip(), chosen)
                st.toast(viewer.t("members.added"), icon=":material/person_add:")
    with shown(viewer):
        found = viewer.api.members(course["id"])
        if not found:
            st.info(viewer.t("members.none"), icon=":material/group_off:")
        for member in found:
            _row(viewer, course, member)


def _row(viewer: Viewer, course: dict[str, Any], member: dict[str, Any]) -> None:
    user_id, role = member["id"], str(member["role"])
    with st.container(
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        border=True,
        key=f"member-{user_id}",
    ):
        shown_name = as_text(str(member.get("display_name") or member["username"]))
        colour = "violet" if role == "teacher" else "blue"
        st.markdown(
            f"**{shown_name}** `{member['username']}` :{colour}-badge[{viewer.t(f'role.{role}')}]",
            width="content",
        )
        st.button(
            viewer.t("members.remove"),
            key=f"remove-member-{user_id}",
            icon=":material/person_remove:",
            type="tertiary",
            on_click=_remove,
            args=(viewer, course["id"], user_id),
        )


def _remove(viewer: Viewer, course_id: Any, user_id: Any) -> None:
    try:
        viewer.api.remove_member(course_id, user_id)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")
