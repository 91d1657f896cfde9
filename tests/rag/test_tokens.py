"""Index words: identifiers, English stems, Chinese words and pairs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.stem import stem
from rag.tokens import cjk_share, has_cjk, tokenize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parseExprList", {"parseexprlist", "list"}),
        ("read_token2", {"read_token2", "read", "token", "2"}),
        ("gcc -O2 main.c", {"gcc", "-o2", "c"}),
        ("movl %eax, -4(%rbp)", {"%eax", "%rbp", "movl"}),
        ("a -> b := c", {"->", ":="}),
        ("x * y", {"*"}),
        ("LL(1) and LR(0)", {"ll", "1", "lr", "0"}),
        ("C++ and C#", {"c++", "c#"}),
        ("0x1F 3.14", {"0x1f", "3.14"}),
    ],
)
def test_code_words_are_found_whole_and_in_parts(text: str, words: set[str]) -> None:
    assert words <= set(tokenize(text))


def test_a_question_meets_an_identifier_in_other_spelling() -> None:
    assert set(tokenize("symbol table")) <= set(tokenize("SymbolTable symbol_table"))
    assert set(tokenize("EAX register")) & set(tokenize("%eax"))


@pytest.mark.parametrize(
    "family",
    [
        ["parse", "parses", "parsed", "parsing"],
        ["allocate", "allocates", "allocated", "allocation", "allocator"],
        ["optimize", "optimization", "optimizing", "optimizer"],
        ["copy", "copies", "copied"],
        ["register", "registers"],
        ["stop", "stopped", "stopping"],
        ["class", "classes"],
    ],
)
def test_forms_of_a_word_share_a_stem(family: list[str]) -> None:
    assert len({stem(word) for word in family}) == 1


def test_different_words_keep_different_stems() -> None:
    words = ["stack", "heap", "state", "static", "token", "tokenizer", "use", "user", "pass"]
    assert len({stem(word) for word in words}) >= len(words) - 1


def test_chinese_gives_words_and_pairs_without_stop_words() -> None:
    words = tokenize("寄存器分配的溢出代码是什么")
    assert {"寄存器", "分配", "溢出", "代码"} <= set(words)
    assert {"寄存", "存器"} <= set(words)
    assert not {"的", "是", "什么"} & set(words)


def test_full_width_and_case_make_no_difference() -> None:
    assert tokenize("ＬＲ（１） Parser") == tokenize("lr(1) parser")


def test_share_of_chinese() -> None:
    assert cjk_share("abc") == 0
    assert cjk_share("编译") == 1
    assert cjk_share("编译ab") == 0.5
    assert cjk_share("12 !") == 0
    assert has_cjk("a 编")
    assert not has_cjk("é")


@given(st.text(max_size=300))
def test_any_text_gives_words_without_white_space(text: str) -> None:
    for word in tokenize(text):
        assert word
        assert "\n" not in word
        assert word == word.strip()
