"""The Streamlit script: signs in by the cookie, offers the pages of the role, runs one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import streamlit as st

from web import components
from web.client import SESSION_COOKIE, ApiError, PasswordChangeRequired, SignedOut
from web.errors import sentence
from web.forms import CSRF_COOKIE
from web.session import Render, Viewer, language, load_viewer, make_api
from web.settings import WebSettings
from web.style import apply_style
from web.texts import LANGUAGES, text
from web.views import chat, documents, keys, monitoring, search, users

_ASSETS = Path(__file__).parent.parent / "assets"
_MARK = _ASSETS / "mark.svg"
# How soon a page notices that its session ended elsewhere.
_WATCH_SECONDS = 10
# Secrets that a page shows once; they do not outlive the page.
_SHOWN_ONCE = {"new_key": "keys", "one_time_password": "users"}


def _signed_out(target: str) -> None:
    """Nothing of the page remains; the browser goes on to the form, with a link if it does not."""
    st.session_state.clear()
    chosen = language()
    st.title(text(chosen, "session.ended"), anchor=False)
    st.markdown(f"[{text(chosen, 'session.sign_in')}]({target})")
    components.leave(target)
    st.stop()


def _unreachable() -> None:
    chosen = language()
    st.title("Lectern", anchor=False)
    st.error(text(chosen, "error.backend_unreachable"), icon=":material/cloud_off:")

    @st.fragment(run_every=3)
    def look_again() -> None:
        try:
            make_api(WebSettings.from_environment()).me()
        except (SignedOut, PasswordChangeRequired):
            st.rerun()
        except ApiError:
            st.caption(text(chosen, "error.looking_again"))
        else:
            st.rerun()

    look_again()
    st.stop()


@st.fragment(run_every=_WATCH_SECONDS)
def _watch_session() -> None:
    """Notice a sign-out in another tab, a deactivation or another person in this browser."""
    try:
        me = make_api(WebSettings.from_environment()).me()
    except (SignedOut, PasswordChangeRequired):
        st.rerun()
    except ApiError:
        return  # the backend is away for a moment; what the page does next will say so
    if me["user"]["id"] != st.session_state.get("user_id"):
        st.rerun()


def _account(viewer: Viewer) -> None:
    other = next(code for code in LANGUAGES if code != viewer.language)
    name = str(viewer.user.get("display_name") or viewer.user["username"])
    with st.sidebar:
        st.space("small")
        components.account_bar(
            {
                "name": name,
                "initial": name[:1].upper(),
                "role": viewer.t(f"role.{viewer.user['role']}"),
                "other": other,
                "otherName": LANGUAGES[other],
                "password": viewer.t("account.password"),
                "logout": viewer.t("account.logout"),
                "csrf": st.context.cookies.get(CSRF_COOKIE, ""),
            }
        )


def _pages(viewer: Viewer) -> list[tuple[str, str, Render]]:
    pages: list[tuple[str, str, Render]] = [
        ("chat", ":material/forum:", chat.render),
        ("search", ":material/search:", search.render),
        ("keys", ":material/key:", keys.render),
    ]
    if viewer.is_teacher:
        pages.append(("documents", ":material/library_books:", documents.render))
    if viewer.is_administrator:
        pages.append(("users", ":material/group:", users.render))
        pages.append(("monitoring", ":material/monitoring:", monitoring.render))
    return pages


def main() -> None:
    st.set_page_config(
        page_title="Lectern",
        page_icon=str(_MARK),
        layout="centered",
        initial_sidebar_state="auto",
        menu_items={"Get help": None, "Report a bug": None, "About": None},
    )
    apply_style()
    st.logo(str(_ASSETS / "wordmark.svg"), size="large", icon_image=str(_MARK))
    if not st.context.cookies.get(SESSION_COOKIE):
        _signed_out("/login")
    try:
        viewer = load_viewer(WebSettings.from_environment())
    except SignedOut:
        _signed_out("/login")
    except PasswordChangeRequired:
        _signed_out("/password")
    except ApiError:
        _unreachable()
    else:
        if viewer.user.get("must_change_password"):
            _signed_out("/password")
        _run(viewer)


def _run(viewer: Viewer) -> None:
    available = _pages(viewer)
    offered = [
        st.Page(
            partial(render, viewer),
            title=viewer.t(f"nav.{name}"),
            icon=icon,
            url_path=name,
            default=name == "chat",
        )
        for name, icon, render in available
    ]
    page = st.navigation(offered)
    current = page.url_path or "chat"
    for key, owner in _SHOWN_ONCE.items():
        if owner != current:
            st.session_state.pop(key, None)
    if st.session_state.get("page") != current:
        st.session_state["page"] = current
        st.session_state.pop("open_passage", None)
    with st.sidebar:
        _watch_session()
    try:
        page.run()
    except SignedOut:
        _signed_out("/login")
    except PasswordChangeRequired:
        _signed_out("/password")
    except ApiError as error:
        st.error(sentence(viewer, error), icon=":material/error:")
    _account(viewer)


main()
