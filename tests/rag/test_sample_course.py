"""The sample course: enough of it, questions that are honest, anchors that are there."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rjieba

from rag.documents import parse
from rag.passages import PassageDraft, pack
from rag.sample import sample_course_folder
from rag.stem import ENGLISH_STOPWORDS, stem

COURSE = sample_course_folder()
DOCUMENTS = COURSE / "documents"
HAN = re.compile(r"[\u3400-\u9fff]")
#: Words of a Chinese question that carry its grammar, not its subject.
_GRAMMAR = """
的 了 和 与 或 是 在 有 也 都 就 还 又 被 把 对 从 到 于 而 但 并 其 之 个 这 那 这个 那个 这些
那些 什么 怎么 怎样 如何 为什么 哪 哪些 哪个 哪里 哪儿 哪几 多少 多 大 吗 呢 吧 啊 我 你 他 它
它们 我们 一个 一种 一 几 条 可 可以 能 会 要 要不要 应该 应 该 需要 不 没 没有 不是 是不是 还是
如果 因为 所以 但是 然后 以及 时候 以后 之后 之前 里 里面 中 上 下 后 前 时 为 让 给 用 以 由 等
很 太 更 最 只 再 才 却 着 过 地 得 老 老是 总 说 像是 怎么办 怎么回事 解决 算 算不算 有关系
有没有 其余
"""
CHINESE_STOPWORDS = frozenset(_GRAMMAR.split())


def questions() -> list[dict[str, Any]]:
    lines = (COURSE / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


QUESTIONS = questions()


@cache
def passages(path: str) -> tuple[PassageDraft, ...]:
    file = DOCUMENTS / path
    return tuple(pack(parse(file.read_bytes(), file.name)))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def right_passages(path: str, anchor: str) -> list[PassageDraft]:
    return [p for p in passages(path) if squeezed(anchor) in squeezed(p.text)]


def english_words(text: str) -> set[str]:
    words = re.findall(r"[A-Za-z][A-Za-z0-9_]*|\d+", text)
    return {stem(w.lower()) for w in words if w.lower() not in ENGLISH_STOPWORDS}


def chinese_words(text: str) -> set[str]:
    words = {w for run in re.findall(HAN.pattern + "+", text) for w in rjieba.cut(run)}
    return words - CHINESE_STOPWORDS


def content_words(text: str) -> set[str]:
    """Content words of a text in Chinese, English or both; English ones are stemmed."""
    return english_words(text) | chinese_words(text)


def found_in(words: set[str], text: str) -> set[str]:
    """The words that occur in the text: Chinese ones as strings, English ones by their stem."""
    stems = english_words(text)
    return {w for w in words if (w in text if HAN.search(w) else w in stems)}


def test_course_file_names_every_document_once() -> None:
    course = tomllib.loads((COURSE / "course.toml").read_text("utf-8"))
    assert course["slug"] == "compilers"
    assert course["name"] == {"zh": "编译原理实践", "en": "Compiler Construction"}
    named = [entry["path"] for entry in course["documents"]]
    there = sorted(p.relative_to(DOCUMENTS).as_posix() for p in DOCUMENTS.rglob("*") if p.is_file())
    assert sorted(named) == there
    assert all(
        entry["title"] and entry["language"] in ("zh", "en") for entry in course["documents"]
    )


def test_there_is_enough_of_it_in_both_languages() -> None:
    files = [p for p in DOCUMENTS.rglob("*") if p.is_file()]
    handouts = [p for p in files if p.suffix in (".md", ".pdf", ".ipynb")]
    assert len(handouts) >= 12
    assert {".md", ".pdf", ".ipynb", ".l", ".y", ".g4", ".ll", ".py", ".c"} <= {
        p.suffix for p in files
    }
    counts: Counter[str] = Counter()
    for file in files:
        path = file.relative_to(DOCUMENTS).as_posix()
        counts[path.split("/")[0]] += len(passages(path))
    assert counts.total() >= 250
    assert counts["zh"] >= 100
    assert counts["en"] >= 100


def test_it_is_small() -> None:
    sizes = [p.stat().st_size for p in COURSE.rglob("*") if p.is_file()]
    assert sum(sizes) < 1_500_000
    assert (DOCUMENTS / "en/19-garbage-collection.pdf").stat().st_size < 300_000


def test_sixty_different_questions_in_three_sets() -> None:
    assert Counter(q["set"] for q in QUESTIONS) == {"zh-zh": 20, "en-en": 20, "zh-en": 20}
    assert len({q["question"] for q in QUESTIONS}) == 60
    for q in QUESTIONS:
        asked, over = q["set"].split("-")
        assert bool(HAN.search(q["question"])) == (asked == "zh"), q["question"]
        assert q["path"].split("/")[0] == over


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda q: q["question"][:40])
def test_question(row: dict[str, Any]) -> None:
    """Anchors lie in a passage; the question neither repeats it nor names its heading.

    A Chinese question over an English passage shares only names and symbols with it: those few
    words are what can be compared, and its Chinese words count as not occurring.
    """
    asked = content_words(row["question"])
    assert len(asked) >= 4
    answers = [(row["path"], row["anchor"])] + [(a["path"], a["anchor"]) for a in row["alt"]]
    for path, anchor in answers:
        assert 40 <= len(anchor) <= 120
        right = right_passages(path, anchor)
        assert right, f"{anchor!r} is in no passage of {path}"
        for passage in right:
            shared = found_in(asked, passage.text)
            assert len(shared) * 2 <= len(asked), f"{sorted(shared)} of {sorted(asked)}"
            for heading in passage.heading_path[-1:]:
                named = content_words(heading)
                assert found_in(named, row["question"]) != named, f"names the heading {heading!r}"


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda q: q["question"][:40])
def test_key_phrase_lies_in_the_right_passage(row: dict[str, Any]) -> None:
    right = right_passages(row["path"], row["anchor"])
    assert any(row["key_phrase"] in squeezed(p.text) for p in right)
    assert row["key_phrase"] not in row["question"]


def test_unanswerable_questions() -> None:
    lines = (COURSE / "unanswerable.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["set"] for row in rows) == {"zh": 10, "en": 10}
    assert len({row["question"] for row in rows}) == 20
    for row in rows:
        assert bool(HAN.search(row["question"])) == (row["set"] == "zh")


def load_generator() -> ModuleType:
    file = COURSE / "pdf_source" / "make_pdf.py"
    spec = importlib.util.spec_from_file_location("make_pdf", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pdf_is_made_from_its_text(tmp_path: Path) -> None:
    source = COURSE / "pdf_source" / "19-garbage-collection.txt"
    made = tmp_path / "made.pdf"
    load_generator().make(source, made)
    committed = DOCUMENTS / "en" / "19-garbage-collection.pdf"
    text = parse(committed.read_bytes(), committed.name).text
    assert parse(made.read_bytes(), made.name).text == text
    words = re.findall(r"\w+", source.read_text("utf-8"))
    assert Counter(re.findall(r"\w+", text)) == Counter(words)


def test_notebook_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((DOCUMENTS / "zh/20-first-follow.ipynb").read_text("utf-8"))
    scope: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    for cell in cells:
        exec("".join(cell["source"]), scope)
        printed = "".join("".join(out["text"]) for out in cell["outputs"])
        assert capsys.readouterr().out == printed


def test_python_samples_print_what_they_should() -> None:
    def run(name: str) -> list[str]:
        file = DOCUMENTS / "src" / name
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert run("linear_scan.py") == ["a stack[0]", "b t1", "c t0", "d t1", "e t0"]
    assert "test in ['i', 'n', 's'] out ['i', 'n', 's']" in run("worklist.py")
