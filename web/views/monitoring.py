"""Live figures of the engine, for administrators."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from web.errors import shown
from web.markdown import as_text
from web.session import Viewer
from web.settings import SERIES_COLOURS

_REFRESH_SECONDS = 2
_STAGE_STATES = ("busy", "wait_input", "wait_link", "idle")
_STAGE_COLOURS = ("#4263eb", "#f59f00", "#e64980", "#adb5bd")
_PAGE_STATES = ("used", "cached", "free")
_PAGE_COLOURS = ("#4263eb", "#15aabf", "#adb5bd")


def render(viewer: Viewer) -> None:
    if not viewer.is_administrator:
        st.error(viewer.t("error.forbidden"), icon=":material/lock:")
        return
    st.set_page_config(layout="wide")
    st.title(viewer.t("monitoring.title"), anchor=False)

    @st.fragment(run_every=_REFRESH_SECONDS)
    def live() -> None:
        with shown(viewer):
            _show(viewer, viewer.api.overview())

    live()


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def milliseconds(seconds: float | None) -> str:
    """A time in ms below a second, in s above."""
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _show(viewer: Viewer, overview: dict[str, Any]) -> None:
    engine = overview.get("engine") or {}
    if not engine.get("reachable"):
        st.error(viewer.t("monitoring.unreachable"), icon=":material/cloud_off:")
    else:
        st.markdown(
            f":green-badge[:material/check: {viewer.t('monitoring.reachable')}] "
            f"{as_text(str(engine.get('model') or ''))}"
        )
    series = overview.get("series") or []
    _figures(viewer, engine)
    left, right = st.columns(2, gap="medium")
    with left, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.stages')}**")
        _stages(viewer, engine.get("stages") or [])
    with right, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.pages')}**")
        _pages(viewer, engine.get("kv_pages") or {})
    with left, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.throughput')}**")
        _line(viewer, series, ("generation_tokens_s",), viewer.t("monitoring.tokens_s"))
    with right, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.latency')}**")
        _line(viewer, series, ("ttft_p50_s", "tpot_p50_s"), viewer.t("monitoring.ms"), scale=1000)
    with left, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.running_chart')}**")
        _line(viewer, series, ("requests_running",), viewer.t("monitoring.requests"))
    with right, st.container(border=True):
        st.markdown(f"**{viewer.t('monitoring.backend')}**")
        _backend(viewer, overview.get("backend") or {})


def _figures(viewer: Viewer, engine: dict[str, Any]) -> None:
    figures = [
        (viewer.t("monitoring.running"), number(engine.get("requests_running"))),
        (viewer.t("monitoring.waiting"), number(engine.get("requests_waiting"))),
        (viewer.t("monitoring.generation"), number(engine.get("generation_tokens_s"), 1)),
        (viewer.t("monitoring.prompt"), number(engine.get("prompt_tokens_s"), 1)),
    ]
    figures += [
        (viewer.t(f"monitoring.{name}"), milliseconds(engine.get(f"{name}_s")))
        for name in ("ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95")
    ]
    for row in (figures[:4], figures[4:]):
        for column, (label, value) in zip(st.columns(4), row, strict=True):
            column.metric(label, value, border=True)


def _line(
    viewer: Viewer,
    series: list[dict[str, Any]],
    fields: tuple[str, ...],
    unit: str,
    *,
    scale: float = 1.0,
) -> None:
    rows = [
        {
            "t": pd.to_datetime(point["t"], unit="s", utc=True)
            if isinstance(point["t"], int | float)
            else pd.to_datetime(point["t"], utc=True),
            "value": float(point[field]) * scale,
            "series": viewer.t(f"monitoring.series_{field}"),
        }
        for point in series
        for field in fields
        if point.get(field) is not None
    ]
    if not rows:
        st.caption(viewer.t("monitoring.nothing_yet"))
        return
    names = [viewer.t(f"monitoring.series_{field}") for field in fields]
    legend = alt.Legend(orient="top") if len(fields) > 1 else None
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(interpolate="monotone", strokeWidth=2)
        .encode(
            x=alt.X("t:T", title=None, axis=alt.Axis(format="%H:%M:%S", tickCount=5)),
            y=alt.Y("value:Q", title=unit, scale=alt.Scale(zero=True, nice=True)),
            color=alt.Color(
                "series:N",
                title=None,
                scale=alt.Scale(domain=names, range=SERIES_COLOURS[: len(names)]),
                legend=legend,
            ),
        )
        .properties(height=220)
    )
    st.altair_chart(chart, width="stretch")


def _shares(
    rows: list[dict[str, Any]], order: list[str], colours: tuple[str, ...], height: int, axis: str
) -> alt.Chart:
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(cornerRadius=2)
        .encode(
            y=alt.Y("row:N", title=None, sort=None),
            x=alt.X("value:Q", title=None, stack="zero", axis=alt.Axis(format=axis)),
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=order, range=list(colours)),
                legend=alt.Legend(orient="top", columns=2, labelLimit=240),
            ),
            order=alt.Order("rank:Q"),
            tooltip=["row:N", "state:N", alt.Tooltip("value:Q", format=axis)],
        )
        .properties(height=height)
    )


def _stages(viewer: Viewer, stages: list[dict[str, Any]]) -> None:
    """Each stage's time since the last look, as shares of one."""
    rows = []
    for stage in stages:
        values = [float(stage.get(state) or 0.0) for state in _STAGE_STATES]
        total = sum(values)
        for rank, (state, value) in enumerate(zip(_STAGE_STATES, values, strict=True)):
            rows.append(
                {
                    "row": viewer.t("monitoring.stage", n=stage["stage"]),
                    "state": viewer.t(f"monitoring.stage_{state}"),
                    "value": value / total if total else 0.0,
                    "rank": rank,
                }
            )
    if not rows:
        st.caption(viewer.t("monitoring.nothing_yet"))
        return
    order = [viewer.t(f"monitoring.stage_{state}") for state in _STAGE_STATES]
    st.altair_chart(
        _shares(rows, order, _STAGE_COLOURS, 110 + 34 * len(stages), "%"), width="stretch"
    )


def _pages(viewer: Viewer, pages: dict[str, Any]) -> None:
    counts = {state: int(pages.get(state) or 0) for state in _PAGE_STATES}
    if not sum(counts.values()):
        st.caption(viewer.t("monitoring.nothing_yet"))
        return
    rows = [
        {"row": "KV", "state": viewer.t(f"monitoring.page_{state}"), "value": count, "rank": rank}
        for rank, (state, count) in enumerate(counts.items())
    ]
    order = [viewer.t(f"monitoring.page_{state}") for state in _PAGE_STATES]
    st.altair_chart(_shares(rows, order, _PAGE_COLOURS, 140, "d"), width="stretch")
    st.caption(
        viewer.t(
            "monitoring.page_counts",
            used=number(counts["used"]),
            cached=number(counts["cached"]),
            free=number(counts["free"]),
        )
    )


def _backend(viewer: Viewer, backend: dict[str, Any]) -> None:
    figures = {key: value for key, value in backend.items() if isinstance(value, int | float | str)}
    for key, value in backend.items():
        if isinstance(value, dict):
            figures.update({f"{key} · {name}": entry for name, entry in value.items()})
    if not figures:
        st.caption(viewer.t("monitoring.nothing_yet"))
        return
    rows = [{"name": key.replace("_", " "), "value": str(value)} for key, value in figures.items()]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        column_config={"name": viewer.t("monitoring.name"), "value": viewer.t("monitoring.value")},
        height=220,
    )
