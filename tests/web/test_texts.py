"""The catalogue: every text in every language, every key used and every used key there."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from web.texts import CATALOGUE, LANGUAGES, catalogue, choose_language, text

WEB = CATALOGUE.parent
# Keys that are put together from a value; the values are listed in the code beside them.
_FAMILIES = (
    "chat.suggestion_",
    "chat.left_out_",
    "documents.state_",
    "error.",
    "monitoring.page_",
    "monitoring.series_",
    "monitoring.stage_",
    "monitoring.tpot_",
    "monitoring.ttft_",
    "nav.",
    "role.",
)


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def _sources() -> str:
    files = [*WEB.rglob("*.py"), *WEB.rglob("*.html")]
    return "\n".join(file.read_text("utf-8") for file in files if "__pycache__" not in str(file))


@pytest.mark.parametrize("key", sorted(catalogue()))
def test_a_text_exists_in_every_language_with_the_same_fields(key: str) -> None:
    texts = catalogue()[key]
    assert set(texts) == set(LANGUAGES)
    assert all(value.strip() for value in texts.values())
    assert _fields(texts["zh"]) == _fields(texts["en"])


def test_chinese_texts_are_chinese() -> None:
    chinese = re.compile(r"[\u4e00-\u9fff]")
    assert [key for key, texts in catalogue().items() if not chinese.search(texts["zh"])] == []
    assert [key for key, texts in catalogue().items() if chinese.search(texts["en"])] == []


def test_every_key_in_the_code_is_in_the_catalogue_and_the_other_way_round() -> None:
    source = _sources()
    sections = {key.partition(".")[0] for key in catalogue()}
    named = set(re.findall(r"""["']([a-z]+\.[a-z][a-z0-9_]*)["']""", source))
    used = {name for name in named if name.partition(".")[0] in sections}
    files = {path.name for path in WEB.rglob("*") if path.is_file()}
    assert used - set(catalogue()) - files == set()
    unused = {
        key for key in set(catalogue()) - used if not any(key.startswith(f) for f in _FAMILIES)
    }
    assert unused == set()


def test_fields_are_filled_in() -> None:
    assert text("en", "chat.found", n=3) == "3 passages found"
    assert text("zh", "chat.found", n=3) == "找到 3 段相关资料"
    with pytest.raises(KeyError):
        text("en", "chat.no_such_text")


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        (None, None, "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "fr-FR,fr;q=0.9", "en"),
        (None, "fr,zh-TW;q=0.5", "zh"),
        ("en", "zh-CN", "en"),
        ("xx", "zh-CN", "zh"),
    ],
)
def test_the_language_chosen_before_wins(
    cookie: str | None, accepted: str | None, language: str
) -> None:
    assert choose_language(cookie, accepted) == language


def test_the_catalogue_is_beside_its_module() -> None:
    assert Path(CATALOGUE).is_file()
