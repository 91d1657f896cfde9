"""Parsing: structure that is kept, and bad files that are named."""

from __future__ import annotations

import io
import json

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reportlab.lib.pagesizes import A5
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfgen.canvas import Canvas

from rag.documents import Document, DocumentError, Limits, parse
from rag.documents.model import Block


def kinds(document: Document) -> list[str]:
    return [block.kind for block in document.blocks]


def shown(document: Document, block: Block) -> str:
    return document.text[block.start : block.end]


def refused(data: bytes, name: str, limits: Limits | None = None) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        parse(data, name, limits)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".") or caught.value.code == "unsupported"
    return caught.value


def attempt(data: bytes, name: str) -> tuple[Document | None, str]:
    """Return the document or the code of the refusal; any other error is the test's failure."""
    try:
        return parse(data, name), ""
    except DocumentError as error:
        return None, error.code


def make_pdf(pages: list[list[tuple[str, str, float]]], *, running: str = "") -> bytes:
    """Return a PDF; a page is a list of (font, text, size) lines from top to bottom."""
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=A5)
    canvas.setTitle("Registers and Spills")
    for number, lines in enumerate(pages, start=1):
        y = 550.0
        if running:
            canvas.setFont("Helvetica", 8)
            canvas.drawString(40, 580, running)
            canvas.drawString(40, 20, f"page {number}")
        for font, text, size in lines:
            canvas.setFont(font, size)
            indent = len(text) - len(text.lstrip())
            canvas.drawString(40 + indent * size * 0.6, y, text.strip())
            y -= size * 1.4 if text.strip() else size * 2.2
        canvas.showPage()
    canvas.save()
    return buffer.getvalue()


# Markdown


MARKDOWN = """---
title: Lexing
---
# Scanners

Intro with **bold**.

## Automata

| state | next |
|---|---|
| 0 | 1 |

- first
- second

  ```c
  int x;  // # not a heading
  ```

> quoted

```python
# also not a heading
def f(): pass
```

[ref]: http://example.org "a link definition makes no block of its own"
"""


def test_markdown_blocks_have_kind_path_and_exact_span() -> None:
    document = parse(MARKDOWN.encode(), "handouts/lex.md")
    assert document.title == "Lexing"
    assert kinds(document) == [
        "heading", "prose", "heading", "table", "list", "prose", "code", "prose", "code", "prose",
    ]  # fmt: skip
    code = document.blocks[-2]
    assert shown(document, code).startswith("```python\n")
    assert shown(document, code).endswith("\n```")
    assert code.heading_path == ("Scanners", "Automata")
    assert code.language == "python"
    assert code.fenced


def test_markdown_title_falls_back_to_heading_and_name() -> None:
    assert parse(b"# `ssa` in *short*\n\ntext", "a.md").title == "ssa in short"
    assert parse(b"no heading", "notes.md").title == "notes"


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            ["# A", "## B", "text of a paragraph.", "- item", "1. one", "```c", "```", "~~~~",
             "    indented", "> quote", "> ```", "| a | b |", "|---|---|", "", "---", "<div>",
             "[x]: y", "汉字。", "\u2028", "\x0b"]
        ),
        max_size=25,
    )
)  # fmt: skip
def test_markdown_blocks_cover_any_text_in_order(lines: list[str]) -> None:
    source = "\n".join(lines)
    if not source.strip():
        return
    document, code = attempt(source.encode(), "x.md")
    if document is None:
        assert code in ("empty", "no_text")
        return
    position = 0
    for block in document.blocks:
        assert block.start >= position
        assert not document.text[position : block.start].strip()
        assert shown(document, block).strip()
        position = block.end
    assert not document.text[position:].strip()


# HTML


def test_html_keeps_structure_and_nothing_that_runs() -> None:
    page = """<html><head><title>Parsing &amp; you</title><style>p{}</style></head><body>
    <script>alert('x')</script><h1>Top</h1><p>A <b>bold</b> claim&nbsp;here.</p>
    <h2>Steps</h2><ol><li>shift<li>reduce</ol>
    <pre><code class="language-c">int a;\n  int b;</code></pre>
    <table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td>a|b</td></tr></table>
    <div hidden>secret</div><iframe src="http://x"></iframe><img src=x alt="a parse tree">
    </body></html>"""
    document = parse(page.encode(), "p.html")
    assert document.title == "Parsing & you"
    assert kinds(document) == [
        "heading",
        "prose",
        "heading",
        "list",
        "list",
        "code",
        "table",
        "prose",
    ]
    assert "A bold claim here." in document.text
    assert "```c\nint a;\n  int b;\n```" in document.text
    assert "1. shift" in document.text
    assert "| 1 | a\\|b |" in document.text
    assert "a parse tree" in document.text
    for absent in ("alert", "secret", "p{}", "http:"):
        assert absent not in document.text
    assert document.blocks[-2].heading_path == ("Top", "Steps")


@pytest.mark.parametrize(
    "page",
    ["<p>a<div>b</p>c<table><tr><td>d", "<b><i>x</b></i>", "<pre>unclosed", "<![CDATA[x]]>y<p"],
)
def test_broken_html_still_gives_its_text(page: str) -> None:
    assert parse(page.encode(), "p.html").text.strip()


def test_deep_html_costs_no_stack() -> None:
    page = "<div>" * 50_000 + "deep" + "<ul><li>" * 20_000 + "item"
    assert "deep" in parse(page.encode(), "p.html").text


def test_html_without_text() -> None:
    assert refused(b"<html><script>x()</script></html>", "p.html").code == "no_text"


# PDF


def test_pdf_pages_headings_code_and_running_titles() -> None:
    body = [
        ("Helvetica-Bold", "Spilling", 18.0),
        ("Helvetica", "When no register is left, a value goes to memory,", 10.0),
        ("Helvetica", "and is loaded again before each use.", 10.0),
        ("Helvetica", "", 10.0),
        ("Courier", "load r1, [fp-8]", 9.0),
        ("Courier", "    add r1, r2", 9.0),
    ]
    second = [
        ("STSong-Light", "寄存器不够时，变量会", 12.0),
        ("STSong-Light", "溢出到内存。", 12.0),
    ]
    filler = [
        [("Helvetica", f"Here {word} is explained.", 10.0)] for word in ("a", "the loop", "SSA")
    ]
    data = make_pdf([body, second, *filler], running="Compilers, autumn")
    document = parse(data, "spill.pdf")
    assert document.title == "Registers and Spills"
    assert document.pages == 5
    heading = document.blocks[0]
    assert (heading.kind, shown(document, heading), heading.page) == ("heading", "Spilling", 1)
    assert "goes to memory,\nand is loaded" in document.text
    code = next(b for b in document.blocks if b.kind == "code")
    assert "\n    add r1, r2" in shown(document, code)
    assert code.heading_path == ("Spilling",)
    chinese = next(b for b in document.blocks if b.page == 2)
    assert "变量会溢出到内存。" in shown(document, chinese)
    assert "Compilers, autumn" not in document.text
    assert "page 3" not in document.text


def test_a_pdf_that_pdfium_cannot_open_is_read_by_the_other_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pypdfium2

    data = make_pdf([[("Helvetica", "first page", 10.0)], [("Helvetica", "second page", 10.0)]])

    def fail(*args: object) -> None:
        raise pypdfium2.PdfiumError("cannot load")

    monkeypatch.setattr(pypdfium2, "PdfDocument", fail)
    document = parse(data, "p.pdf")
    assert document.title == "Registers and Spills"
    assert [(shown(document, b), b.page) for b in document.blocks] == [
        ("first page", 1),
        ("second page", 2),
    ]


def test_encrypted_pdf() -> None:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf([[("Helvetica", "secret", 10.0)]])))
    writer.encrypt("open sesame", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    error = refused(buffer.getvalue(), "s.pdf")
    assert error.code == "encrypted"
    assert "password" in str(error)


def test_pdf_without_text_is_called_a_scan() -> None:
    error = refused(make_pdf([[], []]), "scan.pdf")
    assert error.code == "no_text"
    assert "OCR" in str(error)


def test_damaged_pdf() -> None:
    assert refused(b"%PDF-1.7\n" + b"rubbish " * 50, "d.pdf").code == "broken"


def test_a_truncated_pdf_is_read_or_refused() -> None:
    data = make_pdf([[("Helvetica", "some text", 10.0)]])
    document, code = attempt(data[: len(data) // 2], "t.pdf")
    assert (document is not None and document.text) or code in ("broken", "no_text")


def test_too_many_pages() -> None:
    data = make_pdf([[("Helvetica", "x", 10.0)]] * 4)
    assert refused(data, "p.pdf", Limits(pages=3)).code == "too_many_pages"


# Notebooks


def notebook(cells: list[dict[str, object]]) -> bytes:
    return json.dumps({"cells": cells, "nbformat": 4, "metadata": {}}).encode()


def test_notebook_cells_in_order_with_headings_over_code() -> None:
    document = parse(
        notebook(
            [
                {"cell_type": "markdown", "source": ["# FIRST sets\n", "\n", "Compute them."]},
                {
                    "cell_type": "code",
                    "source": "print('```')",
                    "outputs": [{"output_type": "stream", "text": ["{'a'}\n"]}],
                },
                {"cell_type": "raw", "source": "raw"},
                {"cell_type": "code", "source": "", "outputs": []},
            ]
        ),
        "n.ipynb",
    )
    assert document.title == "FIRST sets"
    assert kinds(document) == ["heading", "prose", "code", "code", "prose"]
    assert document.blocks[2].heading_path == ("FIRST sets",)
    assert shown(document, document.blocks[2]) == "```python\nprint('```')\n```"
    assert "{'a'}" in document.text


@pytest.mark.parametrize(
    "data", [b"{not json", b"[1, 2]", b'{"cells": 3}', b'{"cells": ["x"]}', b"[" * 100_000]
)
def test_broken_notebook(data: bytes) -> None:
    assert refused(data, "n.ipynb").code == "broken"


# Source code and plain text


def test_source_code_comes_in_definitions() -> None:
    source = b"""#include <stdio.h>

/* adds */
int add(int a,
        int b) {
    int c = a + b;

    return c;
}
static void stop(void)
{
}
"""
    document = parse(source, "add.c")
    assert [b.heading_path for b in document.blocks] == [(), ("add",), ("stop",)]
    assert shown(document, document.blocks[1]).startswith("/* adds */")
    assert {b.language for b in document.blocks} == {"c"}


@pytest.mark.parametrize(
    ("name", "text", "symbol"),
    [
        ("a.py", "import os\n\n@wrap\ndef run(x):\n    pass\n", "run"),
        ("a.py", "class Node:\n    x = 1\n", "Node"),
        ("a.rs", "pub fn main() {\n}\n", "main"),
        ("a.go", "func (s *T) Close() error {\n}\n", "Close"),
        ("a.java", "public final class Main {\n}\n", "Main"),
        ("a.ll", "define i32 @gcd(i32 %a) {\n}\n", "gcd"),
        ("a.g4", "expr : expr '*' expr ;\n", "expr"),
        ("a.s", "main:\n  ret\n", "main"),
        ("a.ts", "export async function load() {\n}\n", "load"),
    ],
)
def test_definitions_in_many_languages(name: str, text: str, symbol: str) -> None:
    document = parse(text.encode(), name)
    assert symbol in [b.heading_path[-1] for b in document.blocks if b.heading_path]


def test_plain_text_in_paragraphs() -> None:
    document = parse(b"A title\n\nfirst\nparagraph\n\n\n  second  \n", "t.txt")
    assert [shown(document, b) for b in document.blocks] == [
        "A title",
        "first\nparagraph",
        "second",
    ]
    assert document.title == "A title"


# Encodings and wrong files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk"])
def test_chinese_encodings(encoding: str) -> None:
    text = "语法分析器把记号流变成语法树，遇到错误时要恢复。"
    assert parse(text.encode(encoding), "t.txt").text == text


def test_western_encoding_and_damaged_utf8() -> None:
    assert parse("café naïve".encode("latin-1"), "t.txt").text == "café naïve"
    damaged = "编译原理课程讲义第一章".encode() + b"\xff" + "结束".encode()
    assert "编译原理课程讲义第一章" in parse(damaged, "t.txt").text


def test_a_declared_encoding_is_used_and_a_dangerous_one_is_not() -> None:
    russian = "<meta charset='windows-1251'><p>Компилятор"
    assert "Компилятор" in parse(russian.encode("cp1251"), "r.html").text
    parse(b"# coding: punycode\n" + b"\xe9x" * 20_000, "p.py")


def test_big5() -> None:
    text = "編譯器會把程式翻譯成機器碼，這是基本概念。"
    assert parse(text.encode("big5"), "t.txt").text == text


@pytest.mark.parametrize("data", [b"", b"  \n\t ", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.md", "a.pdf", "a.html", "a.ipynb", "a.c", "a.txt"])
def test_empty_files(data: bytes, name: str) -> None:
    assert refused(data, name).code in ("empty", "wrong_type")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%PDF-1.4 ...", "a.md"),
        (b"PK\x03\x04" + b"\0" * 40, "a.txt"),
        (b"\x7fELF\x02\x01", "a.c"),
        (b"\x89PNG\r\n\x1a\n", "a.html"),
        (b"abc\x00def", "a.py"),
        (b"# Title, not a PDF", "a.pdf"),
        (bytes(range(1, 32)) * 20, "a.md"),
    ],
)
def test_files_that_are_not_what_they_say(data: bytes, name: str) -> None:
    error = refused(data, name)
    assert error.code == "wrong_type"
    assert name in str(error)


@pytest.mark.parametrize("name", ["a.docx", "a.exe", "noext", "", "a."])
def test_unsupported(name: str) -> None:
    error = refused(b"text", name)
    assert error.code == "unsupported"
    assert ".md" in str(error)
    assert ".pdf" in str(error)


def test_too_large_in_bytes_and_characters() -> None:
    assert refused(b"x" * 101, "a.md", Limits(bytes=100)).code == "too_large"
    assert refused(b"x " * 60, "a.md", Limits(characters=100)).code == "too_large"
    page = b"<p>" + b"x " * 60
    assert refused(page, "a.html", Limits(characters=100)).code == "too_large"


@settings(deadline=None, max_examples=120)
@given(
    st.binary(max_size=400),
    st.sampled_from(["a.md", "a.html", "a.txt", "a.c", "a.ipynb", "a.y"]),
)
def test_any_bytes_give_a_document_or_a_sentence(data: bytes, name: str) -> None:
    document, code = attempt(data, name)
    assert (document is not None and document.blocks) or code


def test_notebooks_with_odd_fields_are_read() -> None:
    data = notebook(
        [
            {"cell_type": "heading", "level": "x", "source": "Title"},
            {"cell_type": "heading", "level": 10**9, "source": "Other"},
            {"cell_type": "markdown", "source": "half \ud800 a pair"},
        ]
    )
    text = parse(data, "a.ipynb").text
    assert "Title" in text
    text.encode()  # no lone surrogate is left
    with pytest.raises(DocumentError, match="no cell with text"):
        parse(b'{"worksheets": [{"cells": null}]}', "a.ipynb")
