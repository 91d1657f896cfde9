"""HTML to Markdown-like text: what a reader sees, and nothing that runs or loads."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from rag.documents.model import BlockKind, Document, DocumentError, Limits, TextBuilder, fenced

_SKIPPED = {
    "script", "style", "noscript", "template", "svg", "iframe", "object", "embed", "canvas",
    "audio", "video", "form", "select", "button", "textarea", "nav", "head", "math",
}  # fmt: skip
_VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param",
    "source", "track", "wbr",
}  # fmt: skip
_BREAKS = {
    "p", "div", "section", "article", "main", "header", "footer", "aside", "ul", "ol", "dl",
    "dt", "dd", "blockquote", "figure", "figcaption", "table", "hr", "address", "details",
    "summary", "body", "html", "fieldset",
}  # fmt: skip
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_LANGUAGE = re.compile(r"(?:lang(?:uage)?|brush|highlight)[-: ]+([A-Za-z0-9+#_-]+)")
_MAX_DEPTH = 2_000


def parse_html(source: str, stem: str, name: str, limits: Limits) -> Document:
    """Return the readable text of a page: headings, paragraphs, lists, tables and code."""
    reader = _Reader(TextBuilder(limits, name))
    reader.feed(source)
    reader.close()
    reader.flush()
    text = reader.out.text()
    if not text.strip():
        raise DocumentError(f"{name} shows no text; there is nothing to search in it.", "no_text")
    heading = next((b.heading_path[-1] for b in reader.out.blocks if b.kind == "heading"), "")
    title = " ".join("".join(reader.title).split()) or heading or stem
    return Document(title, text, tuple(reader.out.blocks), "html")


class _Reader(HTMLParser):
    """Walks the tags without a tree, so depth and size of the page cost no stack."""

    def __init__(self, out: TextBuilder) -> None:
        super().__init__(convert_charrefs=True)
        self.out = out
        self.title: list[str] = []
        self._words: list[str] = []
        self._kind: BlockKind = "prose"
        self._skip: list[str] = []
        self._lists: list[tuple[str, int]] = []
        self._in_title = False
        self._pre = 0
        self._language = ""
        self._heading = 0
        self._rows: list[list[str]] | None = None
        self._tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        hidden = any(k == "hidden" or (k == "aria-hidden" and v == "true") for k, v in attrs)
        if self._skip or tag in _SKIPPED or (hidden and tag not in _VOID):
            if tag == "body":  # a head that was never closed ends here
                self._skip.clear()
            elif tag not in _VOID and len(self._skip) < _MAX_DEPTH:
                self._skip.append(tag)
            return
        if tag == "br":
            self._words.append("\n" if self._pre else " ")
        elif tag == "img":
            alternative = next((v for k, v in attrs if k == "alt" and v), "")
            self._words.append(f" {alternative} ")
        elif self._pre:
            if tag == "code":
                self._language = self._language or _language(attrs)
        elif tag == "pre":
            self.flush()
            self._pre, self._language = 1, _language(attrs)
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "table":
            self.flush()
            self._tables += 1
            if self._rows is None:
                self._rows = []
        elif tag == "tr" and self._rows is not None:
            self._end_cell()
            self._rows.append([])
        elif self._rows is not None:
            if tag in _BREAKS or tag == "li":
                self._words.append(" ")
        elif tag in _HEADINGS:
            self.flush()
            self._heading = _HEADINGS[tag]
        elif tag == "li":
            self.flush()
            self._kind = "list"
            if self._lists:
                kind, count = self._lists[-1]
                self._lists[-1] = (kind, count + 1)
        elif tag in _BREAKS:
            self.flush()
            if tag in ("ul", "ol") and len(self._lists) < _MAX_DEPTH:
                self._lists.append((tag, 0))

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if self._skip:
            if tag in self._skip:
                while self._skip and self._skip.pop() != tag:
                    pass
            return
        if self._pre:
            if tag == "pre":
                self._end_code()
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "table":
            self._end_cell()
            self._tables = max(0, self._tables - 1)
            if not self._tables:
                self._end_table()
        elif self._rows is not None:
            return
        elif tag in _HEADINGS or tag in _BREAKS or tag == "li":
            self.flush()
            if tag in ("ul", "ol") and self._lists:
                self._lists.pop()

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._skip:
            self._words.append(data)

    def flush(self) -> None:
        """End the paragraph, heading or item being read."""
        if self._pre:
            self._end_code()
            return
        if self._rows is not None:
            if not self._tables:
                self._end_table()
            return
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if text and self._heading:
            self.out.add_heading(self._heading, text)
        elif text and self._kind == "list":
            depth = max(0, len(self._lists) - 1)
            ordered = self._lists and self._lists[-1][0] == "ol"
            mark = f"{self._lists[-1][1]}." if ordered else "-"
            self.out.add("list", f"{'  ' * min(depth, 8)}{mark} {text}")
        elif text:
            self.out.add("prose", text)
        self._heading, self._kind = 0, "prose"

    def close(self) -> None:
        super().close()
        self._tables = 0  # an unclosed table ends with the page
        if self._rows is not None:
            self._end_cell()

    def _end_code(self) -> None:
        code = "".join(self._words).strip("\n").rstrip()
        self._words.clear()
        self._pre = 0
        if code.strip():
            code = fenced(code, self._language)
            self.out.add("code", code, language=self._language, fenced=True)

    def _end_cell(self) -> None:
        text = " ".join("".join(self._words).split()).replace("|", "\\|")
        self._words.clear()
        if text and self._rows is not None:
            if not self._rows:
                self._rows.append([])
            self._rows[-1].append(text)

    def _end_table(self) -> None:
        rows = [row for row in self._rows or [] if row]
        self._rows = None
        if rows:
            width = max(len(row) for row in rows)
            lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
            lines.insert(1, "|" + " --- |" * width)
            self.out.add("table", "\n".join(lines))


def _language(attrs: list[tuple[str, str | None]]) -> str:
    found = _LANGUAGE.search(next((v for k, v in attrs if k == "class" and v), ""))
    return found.group(1).lower() if found else ""
