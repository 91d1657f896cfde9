"""The little that the theme's options cannot say."""

from __future__ import annotations

import streamlit as st

_STYLE = """
<style>
  [data-testid="stMainBlockContainer"] { padding-top: 3.25rem; }
  [data-testid="stSidebarUserContent"] { padding-bottom: 1rem; }
  [data-testid="stChatMessage"] { line-height: 1.7; }
  [data-testid="stChatMessage"] a[href*="#cite-"] { text-decoration: none; margin: 0 .1em; }
  [data-testid="stChatMessage"] a[href*="#cite-"]:hover { filter: brightness(.92); }
  [class*="st-key-sources-"] button { max-width: 20rem; text-align: left; }
  [class*="st-key-sources-"] button p { font-size: .84rem; overflow: hidden;
    text-overflow: ellipsis; white-space: nowrap; }
  [class*="st-key-conversation-"] button { justify-content: flex-start; width: 100%; }
  [class*="st-key-conversation-"] button > div { justify-content: flex-start; min-width: 0; }
  [class*="st-key-conversation-"] button p { overflow: hidden; text-overflow: ellipsis;
    white-space: nowrap; text-align: left; }
  .st-key-citations, .st-key-leave { display: none; }
  @media (max-width: 640px) {
    [data-testid="stMainBlockContainer"] { padding-left: 1rem; padding-right: 1rem; }
    [class*="st-key-sources-"] button { max-width: 100%; }
  }
</style>
"""


def apply_style() -> None:
    """Put the style into the page."""
    st.html(_STYLE)
