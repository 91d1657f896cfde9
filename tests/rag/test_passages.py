"""The packer's promises, on made and on random documents."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rag.documents import Document, DocumentError, parse
from rag.passages import BUDGET, PassageDraft, estimate_tokens, pack


def check(document: Document, drafts: list[PassageDraft], budget: int = BUDGET) -> None:
    """Assert everything that holds for the passages of any document."""
    position = 0
    for draft in drafts:
        assert 0 <= draft.start < draft.end <= len(document.text)
        span = document.text[draft.start : draft.end]
        assert span in draft.text
        assert not document.text[position : draft.start].strip(), "text was left out"
        assert draft.end > position, "passages come in order"
        position = draft.end
        assert balanced(draft.text), draft.text
    assert not document.text[position:].strip(), "text was left out at the end"
    if any(block.kind != "heading" for block in document.blocks) and document.format == "markdown":
        for draft in drafts:
            assert not heading_only(draft.text), draft.text


def balanced(text: str) -> bool:
    """Say whether every fence in the text is closed, by the parser's own reading."""
    lines = text.split("\n")
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "fence" and token.map:
            last = lines[token.map[1] - 1].strip().lstrip("> ")
            if token.map[1] - token.map[0] < 2 or not last.startswith(token.markup):
                return False
    return True


def heading_only(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return all(re.match(r"#{1,6} ", line) for line in lines)


def test_small_sections_under_one_heading_share_a_passage() -> None:
    source = "# T\n\n" + "\n\n".join(f"## S{i}\n\nSection {i} is short." for i in range(4))
    document = parse(source.encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert len(drafts) == 1
    assert drafts[0].heading_path == ("T",)


def test_sections_of_other_chapters_stay_apart() -> None:
    document = parse(b"# A\n\n## A1\n\none.\n\n# B\n\n## B1\n\ntwo.", "a.md")
    assert [d.heading_path for d in pack(document)] == [("A", "A1"), ("B", "B1")]


def test_a_fence_that_fits_is_never_cut() -> None:
    code = "\n".join(f"line_{i} = compute({i})" for i in range(12))
    paragraph = "Some words of explanation stand here. " * 12
    source = f"# T\n\n{paragraph}\n\n```python\n{code}\n```\n\n{paragraph}"
    document = parse(source.encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert sum(code in draft.text for draft in drafts) == 1


@pytest.mark.parametrize("mark", ["```", "~~~~", "  ```", "> ```"])
def test_a_fence_that_is_too_long_is_opened_again(mark: str) -> None:
    prefix = mark[: len(mark) - len(mark.lstrip("> "))]
    rows = []
    for i in range(80):
        rows += [
            f"{prefix}int f{i}(int x) {{",
            f"{prefix}    return x + {i};",
            f"{prefix}}}",
            prefix,
        ]
    source = "# T\n\n" + "\n".join([f"{mark}c", *rows, mark])
    document = parse(source.encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert len(drafts) > 3
    for draft in drafts:
        assert estimate_tokens(draft.text) <= BUDGET * 1.2
        assert "c\n" in draft.text.split("```" if "`" in mark else "~~~~")[1]
    assert all(d.text.rstrip("`~> \n").rstrip().endswith("}") for d in drafts)


def test_an_unclosed_fence_is_closed_in_its_passage() -> None:
    document = parse(b"# T\n\n```c\nint x;", "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert drafts[0].text.endswith("int x;\n```")


def test_a_long_table_repeats_its_head() -> None:
    rows = "\n".join(f"| state {i} | token {i} | action number {i} |" for i in range(80))
    document = parse(f"| s | t | a |\n|---|---|---|\n{rows}".encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert len(drafts) > 1
    assert all(draft.text.startswith("| s | t | a |\n|---|---|---|\n") for draft in drafts)


def test_prose_overlaps_by_whole_sentences_and_code_does_not() -> None:
    sentences = " ".join(f"Sentence number {i} says a little about compilers." for i in range(80))
    document = parse(f"# T\n\n{sentences}".encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    overlaps = 0
    for above, below in pairwise(drafts):
        overlaps += below.start < above.end
        assert below.text.startswith("Sentence number")
    assert overlaps == len(drafts) - 1
    source = "\n\n".join(f"def f{i}(x):\n    return x * {i}" for i in range(80))
    code = parse(source.encode(), "a.py")
    pieces = pack(code)
    check(code, pieces)
    assert all(a.end <= b.start for a, b in pairwise(pieces))


def test_chinese_prose_is_cut_at_its_sentence_ends() -> None:
    text = "".join(f"这是第{i}个关于编译器的句子，它说明一件小事。" for i in range(60))
    document = parse(f"# 题\n\n{text}".encode(), "a.md")
    drafts = pack(document)
    check(document, drafts)
    assert len(drafts) > 2
    assert all(draft.text.endswith("。") for draft in drafts)


def test_pages_are_not_mixed_and_title_pages_join_the_next() -> None:
    from tests.rag.test_documents import make_pdf

    pages = [
        [("Helvetica-Bold", "Part Two", 20.0)],
        [("Helvetica", "Body text of the second page stands here.", 10.0)],
        [("Helvetica", "Body text of the third page stands here.", 10.0)],
    ]
    document = parse(make_pdf(pages), "p.pdf")
    drafts = pack(document)
    check(document, drafts)
    assert [draft.page for draft in drafts] == [2, 3]
    assert drafts[0].text.startswith("Part Two")


def test_an_endless_line_is_cut_between_words() -> None:
    document = parse(("word " * 3000).encode(), "a.txt")
    drafts = pack(document)
    check(document, drafts)
    assert all(estimate_tokens(draft.text) <= BUDGET + 40 for draft in drafts)


def test_headings_alone_still_give_a_passage() -> None:
    document = parse(b"# One\n\n## Two", "a.md")
    assert len(pack(document)) == 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("compiler", 2), ("a b", 2), ("编译器", 3), ("x->y", 4), ("1234", 2)],
)
def test_estimate(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


_PIECES = st.sampled_from(
    [
        "# One", "## Two", "### Three", "A short paragraph.", "Long words follow. " * 30,
        "汉语句子在这里。" * 40, "```c\nint x;\n```", "```c\n" + "call(a, b);\n\n" * 60 + "```",
        "~~~\nopen", "- a\n- b\n- c", "- item\n\n  ```\n  code\n  ```",
        "> quote\n> ```\n> c\n> ```",
        "1. " + "words in a list item " * 60, "| a | b |\n|---|---|\n" + "| cell | cell |\n" * 60,
        "---", "***", "    indented code\n    more", "<div>\n\nhtml\n\n</div>", "[r]: http://x",
        "`" * 5 + "\n```\n" + "inner\n" * 200 + "`" * 5, "x" * 3000,
    ]
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(_PIECES, min_size=1, max_size=12), st.sampled_from([60, 120, BUDGET]))
def test_promises_hold_for_random_markdown(pieces: list[str], budget: int) -> None:
    try:
        document = parse("\n\n".join(pieces).encode(), "a.md")
    except DocumentError:
        return
    check(document, pack(document, budget), budget)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.sampled_from("ab (){};\n\t#/*:=\"'"), min_size=1, max_size=800))
def test_promises_hold_for_random_source(source: str) -> None:
    try:
        document = parse(source.encode(), "a.c")
    except DocumentError:
        return
    drafts = pack(document, 60)
    position = 0
    for draft in drafts:
        assert not document.text[position : draft.start].strip()
        position = draft.end
    assert not document.text[position:].strip()
    assert re.sub(r"\s", "", "".join(d.text for d in drafts)) == re.sub(r"\s", "", document.text)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"[" * 300_000, "a.md"),
        (b"# " + b"[" * 300_000, "a.md"),
        (b"> " * 100_000 + b"x", "a.md"),
        (b"x\n" + b"\n" * 500_000 + b"y", "a.md"),
        (b"```\n" + b"\n" * 500_000 + b"y", "a.md"),
        (b"x\n" + b" \n" * 300_000 + b"y", "a.c"),
        (b"_\n\n" * 100_000, "a.txt"),
        (b"# a\n" * 50_000, "a.md"),
        (b"---\n\n" * 50_000, "a.md"),
        (b"*a " * 100_000, "a.md"),
        (b"<" * 300_000, "a.html"),
        (b"<b>" * 200_000 + b"x", "a.html"),
    ],
)
@pytest.mark.timeout(60)
def test_crafted_files_cost_no_more_than_their_size(data: bytes, name: str) -> None:
    document = parse(data, name)
    assert pack(document)[-1].end == len(document.text)
