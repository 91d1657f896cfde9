"""Small pieces of the page with their own script: account bar, citation clicks, passage view.

Streamlit runs component code in the page itself, so the code here is constant; every value that
comes from people, documents or the model is put in with `textContent`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

_FOLDER = Path(__file__).parent / "assets"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text("utf-8")


@st.cache_resource(show_spinner=False)
def _components() -> dict[str, Any]:
    declare = st.components.v2.component
    return {
        "account": declare("lectern_account", css=_read("account.css"), js=_read("account.js")),
        "citations": declare("lectern_citations", js=_read("citations.js")),
        "passage": declare("lectern_passage", css=_read("passage.css"), js=_read("passage.js")),
        "leave": declare("lectern_leave", js=_read("leave.js")),
    }


def account_bar(data: dict[str, str]) -> None:
    """Name, role, language switch and the sign-out form."""
    _components()["account"](data=data, key="account")


def citation_clicks(on_open: Callable[[], None]) -> str | None:
    """Listen for clicks on `#cite-MESSAGE-n`; the clicked target, for one run."""
    result = _components()["citations"](key="citations", on_open_change=on_open, height=1)
    value = result.open
    return value if isinstance(value, str) else None


def passage_view(before: str, passage: str, after: str, label: str, key: str) -> None:
    """A passage highlighted within its surrounding text, scrolled into view."""
    data = {"before": before, "passage": passage, "after": after, "label": label}
    _components()["passage"](data=data, key=key)


def leave(target: str) -> None:
    """Send the browser to another address of ours."""
    _components()["leave"](data={"target": target}, key="leave", height=1)
