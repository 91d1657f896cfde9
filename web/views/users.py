"""Accounts, for administrators."""

from __future__ import annotations

from typing import Any

import streamlit as st

from web.client import ApiError
from web.errors import sentence, shown
from web.markdown import as_text
from web.session import Viewer

_ROLES = ("student", "teacher", "administrator")
_PAGE_SIZE = 25


def render(viewer: Viewer) -> None:
    if not viewer.is_administrator:
        st.error(viewer.t("error.forbidden"), icon=":material/lock:")
        return
    st.title(viewer.t("users.title"), anchor=False)
    _one_time_password(viewer)
    _create(viewer)
    with shown(viewer):
        _list(viewer, viewer.api.users())


def _one_time_password(viewer: Viewer) -> None:
    fresh = st.session_state.get("one_time_password")
    if not fresh:
        return
    with st.container(border=True, key="one-time-password"):
        st.markdown(f"**{viewer.t('users.one_time', name=as_text(fresh['username']))}**")
        st.caption(viewer.t("users.one_time_note"))
        st.code(fresh["password"], language=None)
        st.button(
            viewer.t("users.passed_on"),
            key="one-time-passed-on",
            type="primary",
            icon=":material/check:",
            on_click=lambda: st.session_state.pop("one_time_password", None),
        )


def _create(viewer: Viewer) -> None:
    with (
        st.expander(viewer.t("users.create"), icon=":material/person_add:"),
        st.form("create-user", clear_on_submit=True, border=False),
    ):
        left, right = st.columns(2)
        username = left.text_input(viewer.t("users.username"), max_chars=150)
        name = right.text_input(viewer.t("users.display_name"), max_chars=150)
        role = left.selectbox(
            viewer.t("users.role"), _ROLES, format_func=lambda code: viewer.t(f"role.{code}")
        )
        if st.form_submit_button(viewer.t("users.create_submit"), type="primary"):
            with shown(viewer):
                created = viewer.api.add_user(
                    username.strip(), name.strip() or username.strip(), role
                )
                _keep(username.strip(), created["one_time_password"])
                st.rerun()


def _keep(username: str, password: str) -> None:
    st.session_state["one_time_password"] = {"username": username, "password": password}


def _list(viewer: Viewer, users: list[dict[str, Any]]) -> None:
    wanted = (
        st.text_input(
            viewer.t("users.filter"),
            key="user_filter",
            type="search",
            icon=":material/filter_list:",
            placeholder=viewer.t("users.filter"),
            label_visibility="collapsed",
        )
        .strip()
        .lower()
    )
    if wanted:
        users = [
            user
            for user in users
            if wanted in f"{user['username']} {user.get('display_name') or ''}".lower()
        ]
    st.caption(viewer.t("users.count", n=len(users)))
    pages = max(1, -(-len(users) // _PAGE_SIZE))
    page = st.pagination(pages, key="user_page") if pages > 1 else 1
    for user in users[(page - 1) * _PAGE_SIZE : page * _PAGE_SIZE]:
        _row(viewer, user)


def _row(viewer: Viewer, user: dict[str, Any]) -> None:
    active = bool(user.get("active", True))
    own = user["id"] == viewer.user["id"]
    role = str(user["role"])
    colour = {"administrator": "red", "teacher": "violet"}.get(role, "blue")
    badges = f":{colour}-badge[{viewer.t(f'role.{role}')}]"
    if not active:
        badges += f" :gray-badge[{viewer.t('users.inactive')}]"
    elif user.get("must_change_password"):
        badges += f" :orange-badge[{viewer.t('users.must_change')}]"
    with st.container(
        border=True,
        horizontal=True,
        horizontal_alignment="distribute",
        vertical_alignment="center",
        key=f"user-{user['id']}",
    ):
        name = as_text(str(user.get("display_name") or user["username"]))
        st.markdown(f"**{name}** `{user['username']}` {badges}", width="content")
        with st.container(horizontal=True, width="content", gap="small"):
            st.button(
                viewer.t("users.reset"),
                key=f"reset-{user['id']}",
                icon=":material/lock_reset:",
                on_click=_reset,
                args=(viewer, user),
                disabled=own or not active,
            )
            st.button(
                viewer.t("users.deactivate" if active else "users.activate"),
                key=f"active-{user['id']}",
                icon=":material/person_off:" if active else ":material/person:",
                on_click=_set_active,
                args=(viewer, user["id"], not active),
                disabled=own,
            )


def _reset(viewer: Viewer, user: dict[str, Any]) -> None:
    try:
        _keep(user["username"], viewer.api.reset_user(user["id"])["one_time_password"])
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")


def _set_active(viewer: Viewer, user_id: Any, active: bool) -> None:
    try:
        viewer.api.change_user(user_id, active=active)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")
