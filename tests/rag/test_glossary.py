"""The glossary: its size and form, finding terms, translating, course rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag.glossary import Glossary, GlossaryError, read_rows


@pytest.fixture(scope="module")
def glossary() -> Glossary:
    return Glossary.load()


def test_it_is_large_and_every_row_has_both_sides(glossary: Glossary) -> None:
    file = Path(__file__).parents[2] / "rag" / "glossary" / "zh_en.tsv"
    lines = [x for x in file.read_text(encoding="utf-8").splitlines() if x and x[0] != "#"]
    assert len(lines) >= 600
    for line in lines:
        chinese, english = line.split("\t")
        assert all(any("\u4e00" <= c <= "\u9fff" for c in part) for part in chinese.split("|"))
        assert all(part.strip() and part.isascii() for part in english.split("|")), line
    assert len(glossary) >= len(lines)


@pytest.mark.parametrize(
    ("chinese", "english"),
    [
        ("语法分析", "parsing"),
        ("死锁", "deadlock"),
        ("哈希表", "hash table"),
        ("页表", "page table"),
        ("三次握手", "three-way handshake"),
        ("事务", "transaction"),
        ("反向传播", "backpropagation"),
        ("缓冲区溢出", "buffer overflow"),
        ("流水线", "pipeline"),
        ("特征值", "eigenvalue"),
        ("单元测试", "unit test"),
        ("闭包", "closure"),
    ],
)
def test_it_covers_the_fields_of_computing(glossary: Glossary, chinese: str, english: str) -> None:
    assert english in glossary.english(chinese)


def test_the_longest_terms_win(glossary: Glossary) -> None:
    text = "寄存器分配和常量传播"
    found = [text[term.start : term.end] for term in glossary.find(text)]
    assert "寄存器分配" in found
    assert "常量传播" in found


def test_a_term_of_one_character_needs_to_be_a_word(glossary: Glossary) -> None:
    assert any(term.english[0] == "stack" for term in glossary.find("把它压到栈里"))
    assert not any(term.english[0] == "graph" for term in glossary.find("图书馆在哪里"))


def test_translation_keeps_ascii_and_drops_the_rest(glossary: Glossary) -> None:
    text = glossary.translate("LR(1) 的移进归约冲突怎么解决？")
    assert text.isascii() or "？" in text
    for word in ("LR(1)", "shift-reduce conflict", "solve"):
        assert word in text


def test_coverage(glossary: Glossary) -> None:
    assert glossary.coverage("寄存器分配") == 1
    assert glossary.coverage("魑魅魍魉") == 0
    assert glossary.coverage("no Chinese") == 0


def test_a_course_adds_rows_of_its_own(tmp_path: Path) -> None:
    extra = tmp_path / "course.tsv"
    extra.write_text("# ours\n迷你语言\tMiniLang|mini language\n栈\tpancake stack\n", "utf-8")
    glossary = Glossary.load(extra)
    assert glossary.english("迷你语言") == ("MiniLang", "mini language")
    assert glossary.english("栈") == ("pancake stack", "stack")
    assert glossary.sha256 != Glossary.load().sha256


@pytest.mark.parametrize("row", ["没有制表符 no tab", "\tenglish", "中文\t"])
def test_a_broken_row_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "bad.tsv"
    file.write_text(f"好\tgood\n{row}\n", "utf-8")
    with pytest.raises(GlossaryError, match="Line 2"):
        read_rows(file)
