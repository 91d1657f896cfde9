"""My API keys, how to use them, and what I have used."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from web.client import ApiError
from web.errors import sentence, shown
from web.markdown import as_text
from web.session import Viewer
from web.settings import SERIES_COLOURS

_EXPIRY_DAYS = (30, 120, 365, None)
_USAGE_DAYS = 30


def render(viewer: Viewer) -> None:
    st.title(viewer.t("keys.title"), anchor=False)
    st.caption(viewer.t("keys.explain"))
    _new_key(viewer)
    _key_list(viewer)
    st.subheader(viewer.t("keys.use"), anchor=False)
    _examples(viewer)
    st.subheader(viewer.t("usage.title"), anchor=False)
    _usage(viewer)


def day(value: str | None, *, with_time: bool = False) -> str:
    """An ISO 8601 time as a date (UTC), or a dash."""
    if not value:
        return "–"
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.strftime("%Y-%m-%d %H:%M" if with_time else "%Y-%m-%d")


def _create(viewer: Viewer) -> None:
    name = st.session_state["key_name"].strip()
    if not name:
        st.toast(viewer.t("keys.name_missing"), icon=":material/error:")
        return
    try:
        created = viewer.api.add_key(name, st.session_state["key_expiry"])
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")
        return
    st.session_state["new_key"] = created["key"]


def _revoke(viewer: Viewer, key_id: Any) -> None:
    try:
        viewer.api.revoke_key(key_id)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")


def _new_key(viewer: Viewer) -> None:
    fresh = st.session_state.get("new_key")
    if fresh:
        with st.container(border=True, key="new-key"):
            st.markdown(f"**{viewer.t('keys.created')}**")
            st.caption(viewer.t("keys.once"))
            st.code(fresh, language=None, wrap_lines=True)
            st.button(
                viewer.t("keys.stored"),
                key="new-key-stored",
                type="primary",
                icon=":material/check:",
                on_click=lambda: st.session_state.pop("new_key", None),
            )
        return
    with st.form("create-key", clear_on_submit=True):
        name, expiry, submit = st.columns([3, 2, 1.4], vertical_alignment="bottom")
        name.text_input(
            viewer.t("keys.name"),
            key="key_name",
            max_chars=80,
            placeholder=viewer.t("keys.name_hint"),
        )
        expiry.selectbox(
            viewer.t("keys.expiry"),
            _EXPIRY_DAYS,
            index=1,
            key="key_expiry",
            format_func=lambda days: (
                viewer.t("keys.days", n=days) if days else viewer.t("keys.never")
            ),
        )
        submit.form_submit_button(
            viewer.t("keys.create"),
            type="primary",
            width="stretch",
            on_click=_create,
            args=(viewer,),
        )


def _key_list(viewer: Viewer) -> None:
    with shown(viewer):
        keys = viewer.api.keys()
        if not keys:
            st.info(viewer.t("keys.none"), icon=":material/key_off:")
        for key in keys:
            _key_row(viewer, key)


def _key_row(viewer: Viewer, key: dict[str, Any]) -> None:
    expired = bool(key.get("expires_at")) and _past(key["expires_at"])
    with (
        st.container(border=True, key=f"key-{key['id']}"),
        st.container(
            horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
        ),
    ):
        state = ""
        if key.get("revoked"):
            state = f" :gray-badge[{viewer.t('keys.revoked')}]"
        elif expired:
            state = f" :orange-badge[{viewer.t('keys.expired')}]"
        if key["service_class"] != "standard":
            state += f" :violet-badge[{as_text(key['service_class'])}]"
        prefix = str(key["prefix"])
        with st.container(gap=None, width="content"):
            st.markdown(f"**{as_text(key['name'])}**{state} `{prefix}…{key['last4']}`")
            st.caption(
                viewer.t(
                    "keys.dates",
                    created=day(key.get("created_at")),
                    used=day(key.get("last_used_at"), with_time=True),
                    expires=day(key.get("expires_at")),
                )
            )
        if not key.get("revoked"):
            st.button(
                viewer.t("keys.revoke"),
                key=f"revoke-{key['id']}",
                icon=":material/block:",
                on_click=_revoke,
                args=(viewer, key["id"]),
            )


def _past(value: str) -> bool:
    moment = datetime.fromisoformat(value)
    return moment.replace(tzinfo=moment.tzinfo or UTC) < datetime.now(UTC)


def _examples(viewer: Viewer) -> None:
    base = viewer.settings.api_base_url
    model = viewer.model.get("id") or "MODEL"
    st.caption(viewer.t("keys.base_url"))
    st.code(base, language=None)
    python, shell = st.tabs(["Python (openai)", "curl"])
    python.code(
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{base}", api_key="sk-...")\n\n'
        "for model in client.models.list():\n"
        "    print(model.id)\n\n"
        "stream = client.chat.completions.create(\n"
        f'    model="{model}",\n'
        f'    messages=[{{"role": "user", "content": "{viewer.t("keys.example_question")}"}}],\n'
        "    stream=True,\n"
        ")\n"
        "for chunk in stream:\n"
        "    if chunk.choices:\n"
        '        print(chunk.choices[0].delta.content or "", end="", flush=True)\n',
        language="python",
    )
    shell.code(
        f"curl {base}/chat/completions \\\n"
        '  -H "Authorization: Bearer $LECTERN_API_KEY" -H "Content-Type: application/json" \\\n'
        f'  -d \'{{"model": "{model}", "messages": '
        f'[{{"role": "user", "content": "{viewer.t("keys.example_question")}"}}]}}\'\n',
        language="bash",
    )


def _usage(viewer: Viewer) -> None:
    with shown(viewer):
        usage = viewer.api.usage(_USAGE_DAYS)
        total, days = usage["total"], usage["days"]
        prompt, completion, requests = st.columns(3)
        prompt.metric(viewer.t("usage.prompt"), f"{total['prompt_tokens']:,}", border=True)
        completion.metric(
            viewer.t("usage.completion"), f"{total['completion_tokens']:,}", border=True
        )
        requests.metric(viewer.t("usage.requests"), f"{total['requests']:,}", border=True)
        budget = usage.get("budget_tokens")
        if budget:
            used = int(usage.get("budget_used_today") or 0)
            said = viewer.t("usage.budget", used=f"{used:,}", budget=f"{budget:,}")
            st.progress(min(1.0, used / budget), text=said)
        if not total["requests"]:
            st.caption(viewer.t("usage.none"))
            return
        kinds = {"prompt_tokens": "usage.prompt", "completion_tokens": "usage.completion"}
        rows = [
            {"date": entry["date"], "kind": viewer.t(label), "tokens": entry[field]}
            for entry in days
            for field, label in kinds.items()
        ]
        chart = (
            alt.Chart(pd.DataFrame(rows))
            .mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2)
            .encode(
                x=alt.X("yearmonthdate(date):O", title=None, axis=alt.Axis(format="%m-%d")),
                y=alt.Y("tokens:Q", title=viewer.t("usage.tokens"), stack="zero"),
                color=alt.Color(
                    "kind:N",
                    title=None,
                    scale=alt.Scale(range=SERIES_COLOURS),
                    sort=None,
                    legend=alt.Legend(orient="top"),
                ),
                tooltip=["date:N", "kind:N", "tokens:Q"],
            )
            .properties(height=240)
        )
        st.altair_chart(chart, width="stretch", alt=viewer.t("usage.title"))
