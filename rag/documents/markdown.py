"""Markdown: the canonical text is the source itself; blocks come from the parser's line map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from markdown_it import MarkdownIt
from markdown_it.token import Token

from rag.documents.model import Block, BlockKind, Document, fill_gaps

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE_FIELD = re.compile(r"^title:\s*[\"']?(.+?)[\"']?\s*$", re.MULTILINE)
_LONGEST_HEADING = 300
_KINDS: dict[str, BlockKind] = {
    "paragraph_open": "prose",
    "html_block": "prose",
    "blockquote_open": "prose",
    "code_block": "code",
    "fence": "code",
    "table_open": "table",
    "bullet_list_open": "list",
    "ordered_list_open": "list",
    "list_item_open": "list",
}
_CONTAINERS = {"blockquote_open", "bullet_list_open", "ordered_list_open", "list_item_open"}


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    # Inline marks are not needed for blocks, and their parsing is what crafted input makes slow.
    return MarkdownIt("commonmark").enable("table").disable("inline")


def parse_markdown(source: str, stem: str) -> Document:
    """Return the document of a Markdown source; front matter gives the title and is left out."""
    title = ""
    front = _FRONT_MATTER.match(source)
    if front:
        named = _TITLE_FIELD.search(front.group(1))
        title = named.group(1).strip() if named else ""
        source = source[front.end() :]
    source = source.strip("\n").rstrip()
    blocks = markdown_blocks(source)
    if not title:
        first = next((b for b in blocks if b.kind == "heading"), None)
        title = first.heading_path[-1] if first and first.heading_path else stem
    return Document(title, source, tuple(blocks), "markdown")


def markdown_blocks(source: str) -> list[Block]:
    """Return the blocks of `source` in order; together they cover all of its text."""
    # The parser counts lines by "\n" alone; str.splitlines would count other separators too.
    starts = [0, *accumulate(len(line) + 1 for line in source.split("\n"))]
    starts[-1] = len(source)
    blocks: list[Block] = []
    path: list[tuple[int, str]] = []
    tokens = _parser().parse(source)
    for token, inside in _children(tokens):
        if token.type == "heading_open":
            level = int(token.tag[1:])
            title = plain_heading(inside[0].content if inside else "")
            while path and path[-1][0] >= level:
                path.pop()
            if title:
                path.append((level, title))
            _append(blocks, source, starts, token, "heading", tuple(t for _, t in path))
        else:
            _add_block(blocks, source, starts, token, inside, tuple(t for _, t in path))
    return fill_gaps(source, blocks)


def _children(tokens: Sequence[Token]) -> list[tuple[Token, Sequence[Token]]]:
    """Pair each outermost token with the tokens between it and its closing one."""
    found: list[tuple[Token, Sequence[Token]]] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        end = position
        if token.nesting == 1:
            depth = 1
            while depth:
                end += 1
                depth += tokens[end].nesting
        found.append((token, tokens[position + 1 : end]))
        position = end + 1
    return found


def _add_block(
    blocks: list[Block],
    source: str,
    starts: list[int],
    token: Token,
    inside: Sequence[Token],
    path: tuple[str, ...],
) -> None:
    kind = _KINDS.get(token.type)
    if kind is None or token.map is None:
        return
    is_list = token.type in ("bullet_list_open", "ordered_list_open")
    holds_fence = any(t.type == "fence" for t in inside)
    if is_list or (token.type in _CONTAINERS and holds_fence):
        # Lists come apart into items; a container with code comes apart around the code.
        for child, grandchildren in _children(inside):
            _add_block(blocks, source, starts, child, grandchildren, path)
    else:
        _append(blocks, source, starts, token, kind, path)


def _append(
    blocks: list[Block],
    source: str,
    starts: list[int],
    token: Token,
    kind: BlockKind,
    path: tuple[str, ...],
) -> None:
    if token.map is None:
        return
    start, end = starts[token.map[0]], starts[min(token.map[1], len(starts) - 1)]
    piece = source[start:end]
    end = start + len(piece.rstrip())
    piece = source[start:end]
    start += len(piece) - len(piece.lstrip("\n"))
    if end > start and source[start:end].strip():
        language = token.info.split()[0] if token.type == "fence" and token.info.split() else ""
        blocks.append(Block(kind, start, end, path, None, language, token.type == "fence"))


def plain_heading(text: str) -> str:
    """Return a heading without inline marks, links and attributes."""
    text = text[:_LONGEST_HEADING]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\s*\{#[^}]*\}\s*$", "", text)
    text = re.sub(r"`+([^`]*)`+", r"\1", text)
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", text)
    text = re.sub(r"(?<!\w)([*_])(.+?)\1(?!\w)", r"\2", text)
    return " ".join(text.split())
