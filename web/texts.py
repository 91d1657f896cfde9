"""Texts in Chinese and English, from the catalogue `texts.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

LANGUAGES = {"zh": "中文", "en": "English"}
DEFAULT_LANGUAGE = "en"
LANGUAGE_COOKIE = "lectern_language"
CATALOGUE = Path(__file__).with_name("texts.toml")


@cache
def catalogue() -> dict[str, dict[str, str]]:
    """Key to language to text; keys are `section.name`."""
    sections = tomllib.loads(CATALOGUE.read_text("utf-8"))
    return {
        f"{section}.{name}": texts
        for section, entries in sections.items()
        for name, texts in entries.items()
    }


def text(language: str, key: str, **values: Any) -> str:
    """The text of `key`; KeyError when the catalogue has none."""
    return catalogue()[key][language].format(**values)


def choose_language(cookie: str | None, accepted: str | None) -> str:
    """The language to show: the one chosen before, else the first one the browser accepts."""
    if cookie in LANGUAGES:
        return str(cookie)
    for entry in (accepted or "").split(","):
        code = entry.split(";")[0].strip().lower()[:2]
        if code in LANGUAGES:
            return code
    return DEFAULT_LANGUAGE
