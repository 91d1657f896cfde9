"""The sanitiser: no foreign pictures, no hidden hosts, code and formulas untouched."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from web.markdown import as_text, cited, link_host, safe


def _images_and_links(markdown: str) -> tuple[list[str], list[str]]:
    """Picture and link targets as a CommonMark parser sees them."""
    images: list[str] = []
    links: list[str] = []
    for token in MarkdownIt("commonmark").parse(markdown):
        for child in token.children or []:
            if child.type == "image":
                images.append(str(child.attrs["src"]))
            if child.type == "link_open":
                links.append(str(child.attrs["href"]))
    return images, links


@pytest.mark.parametrize(
    "attack",
    [
        "![x](https://evil.example/p.png)",
        "![x](https://evil.example/p.png 'title')",
        "![x](<https://evil.example/a b.png>)",
        "![](//evil.example/p.png)",
        "![a [b] c](https://evil.example/p.png)",
        "![x][1]\n\n[1]: https://evil.example/p.png",
        "![x][]\n\n[x]: https://evil.example/p.png",
        "![x]\n\n[x]: https://evil.example/p.png",
        "![x](data:image/svg+xml;base64,PHN2Zz4=)",
        "![x\ny](https://evil.example/p.png)",
        "![x](https://evil.example/(a)b.png)",
        "[![x](https://evil.example/p.png)](https://evil.example)",
        "> ![x](https://evil.example/p.png)",
        "- ![x](https://evil.example/p.png)",
        "``not code ![x](https://evil.example/p.png)",
    ],
)
def test_pictures_are_never_loaded(attack: str) -> None:
    assert _images_and_links(safe(attack))[0] == []


def test_a_picture_leaves_its_description_and_host() -> None:
    assert safe("![a tree](https://pics.example/t.png)") == (
        ":material/image: a tree (pics.example)"
    )


@pytest.mark.parametrize(
    ("markdown", "links"),
    [
        ("[a](javascript:alert(1))", []),
        ("[a](JaVaScRiPt:alert)", []),
        ("[a](data:text/html,x)", []),
        ("[a](/logout)", []),
        ("[a](#cite-1-1)", []),
        ("[a][b]\n\n[b]: javascript:alert", []),
        ("[a][b]\n\n[b]: https://hidden.example", []),
        ("<javascript:alert>", []),
        ("<javascript:`alert`>", []),
        ("<javascript:$alert$>", []),
        ("[$](javascript:$)", []),
        ("[a][$b]\n\n[$b]: $", []),
        ("[a](https://user@evil.example/)", []),
        ("[a [b] c](https://hidden.example)", []),
        ("[a `b` c](https://hidden.example)", []),
        ("[a\nb](https://hidden.example)", []),
        ("[a](https://hidden.example/(b)c)", []),
        ("[a](https://hidden.example '(b)')", []),
        ("[a][b]\n\n> [b]: https://hidden.example", []),
        ("[a][b]\n\n- [b]: https://hidden.example", []),
        ("[docs](https://docs.example/x)", ["https://docs.example/x"]),
        ("<https://docs.example/x>", ["https://docs.example/x"]),
    ],
)
def test_only_plain_web_links_remain(markdown: str, links: list[str]) -> None:
    assert _images_and_links(safe(markdown))[1] == links


def test_a_link_shows_its_host() -> None:
    assert safe("[docs](https://docs.example/x)") == (
        "[docs (docs.example)](https://docs.example/x)"
    )
    assert safe("[docs.example](https://docs.example)") == "[docs.example](https://docs.example)"
    assert safe("[bank.example/evil.co](https://evil.co)").startswith(
        "[bank.example/evil.co (evil.co)]"
    )
    assert safe("[bank.example](https://evil.example)") == (
        "[bank.example (evil.example)](https://evil.example)"
    )


@pytest.mark.parametrize(
    "verbatim",
    [
        "```c\nint a[1]; ![x](https://evil.example)\n```",
        "~~~\n![x](y)\n```\n[1]\n~~~",
        "text `a[1]` and ``b`[2]`` end",
        "$a[1] + b$ and $$c[1]\n+ d$$",
    ],
)
def test_code_and_formulas_stay_as_they_are(verbatim: str) -> None:
    assert cited(verbatim, "7", {1, 2}) == verbatim


def test_citations_become_links_only_when_the_passage_exists() -> None:
    assert cited("so [1], 而且[2][3]。[9] x[10]", "42", {1, 2, 3}) == (
        "so [:blue-badge[1]](#cite-42-1), "
        "而且[:blue-badge[2]](#cite-42-2)[:blue-badge[3]](#cite-42-3)。[9] x[10]"
    )
    assert cited("[1, 2]", "4", {1, 2}) == (
        "[:blue-badge[1]](#cite-4-1)[:blue-badge[2]](#cite-4-2)"
    )
    assert cited("[1, 7]", "4", {1, 2}) == "[1, 7]"
    assert "#cite" not in cited("[1](https://evil.example)", "4", {1})


@given(st.text(alphabet="![]()<>`~$:\\\n /ab1h.", max_size=60))
@example("[$]($)")
def test_no_text_brings_a_picture_or_a_foreign_scheme_back(noise: str) -> None:
    images, links = _images_and_links(safe(noise))
    assert images == []
    assert all(link_host(link) for link in links)


@given(st.text(max_size=80))
def test_names_are_literal(name: str) -> None:
    tokens = MarkdownIt("commonmark").parseInline(as_text(name))
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "text_special"}


def test_long_answers_are_quick() -> None:
    """The patterns stay linear: half a megabyte of openings without ends."""
    for piece in ("![", "[a](", "`", "$", "<a:", "[1"):
        safe(piece * 100_000)
