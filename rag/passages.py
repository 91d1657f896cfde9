"""Packs a document's blocks into passages: the unit that is searched, shown and cited.

Rules: a passage is one span of the document's text; code fences, tables and list items are never
cut (one that alone exceeds the budget is cut between lines and its fence opened again); a heading
always stands with text below it; small neighbouring sections share a passage; prose that runs on
into the next passage overlaps it by a sentence or two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rag.documents.model import Block, Document

#: Tokens a passage is filled to. Measured with the default embedder, whose window is 256: from 200
#: to 240 recall grows, above 280 passages begin to lose their ends (title and headings come first).
BUDGET = 240
#: A section at least this full is not joined with the next one.
FULL_ENOUGH = 100
#: Most tokens of prose repeated at the start of the next passage.
OVERLAP = 32

#: Counted for a piece of a cut block, so that nothing joins it.
_ALONE = 1_000_000
_BODILESS = frozenset({"heading", "rule"})
_WORD = re.compile(r"[A-Za-z]+|\d+|[^\W\d_]|[^\w\s]|_")
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_SENTENCE_END = re.compile(r"(?:[.!?][\"')\]]*\s+|[。！？；][”’）」]*|\n\s*\n)")
_OPENING = re.compile(r"^((?:\s|>|[-*+](?=\s)|\d+[.)](?=\s))*)(`{3,}|~{3,})[ \t]*([^\n]*)$")
_TABLE_RULE = re.compile(r"^[\s>]*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")


@dataclass(frozen=True, slots=True)
class PassageDraft:
    """A passage before it has a number.

    `text` is `document.text[start:end]`; only where a code fence or table had to be cut, it has
    the fence or the table's head around that.
    """

    text: str
    heading_path: tuple[str, ...]
    page: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Atom:
    """A span that is never cut: a small block or a piece of a large one."""

    kind: str  # a block kind, or "rule" for ornament such as `---`
    start: int
    end: int
    path: tuple[str, ...]
    page: int | None
    tokens: int
    before: str = ""
    after: str = ""


def estimate_tokens(text: str) -> int:
    """Estimate the word pieces of `text` for an English embedder, without its tokenizer.

    A word counts one piece for each six letters begun, a number for each three digits, every
    Chinese character and every other sign one.
    """
    count = 0
    for match in _WORD.finditer(text):
        piece = match.group()
        first = piece[0]
        if first.isdigit():
            count += (len(piece) + 2) // 3
        elif len(piece) > 1:
            count += (len(piece) + 5) // 6
        else:
            count += 1
    return count


def pack(document: Document, budget: int = BUDGET) -> list[PassageDraft]:
    """Return the passages of a document in order; together they cover all of its text."""
    groups: list[list[_Atom]] = []
    group: list[_Atom] = []
    for atom in _atoms(document, budget):
        if group and not _has_body(group):
            # Headings wait for their text; a whole page of nothing else is its own text.
            if _tokens(group) > budget:
                groups.append(group)
                group = []
        elif group and _must_end(group, atom, budget):
            trailing = _trailing_headings(group)
            groups.append(group[: len(group) - len(trailing)])
            group = [*trailing]
        group.append(atom)
    if group:
        if _has_body(group) or not groups:
            groups.append(group)
        else:  # headings at the very end of the document
            groups[-1].extend(group)
    return _drafts(document, groups)


def _drafts(document: Document, groups: list[list[_Atom]]) -> list[PassageDraft]:
    drafts: list[PassageDraft] = []
    for number, group in enumerate(groups):
        start, end = group[0].start, group[-1].end
        if number:
            start = _overlap_start(document.text, groups[number - 1], group)
        body = [atom for atom in group if atom.kind not in _BODILESS] or group
        text = group[0].before + document.text[start:end] + group[-1].after
        drafts.append(PassageDraft(text, _common_path(body), body[0].page, start, end))
    return drafts


def _must_end(group: list[_Atom], atom: _Atom, budget: int) -> bool:
    used = _tokens(group)
    page = next(a.page for a in group if a.kind not in _BODILESS)
    if atom.page != page or atom.before or group[-1].after:
        return True
    if atom.kind == "rule":
        return used > budget
    if atom.kind == "heading":
        # The next section joins a small one only if both hang under the same heading.
        path = _common_path([a for a in group if a.kind not in _BODILESS])
        parent = atom.path[:-1]
        related = path[: len(parent)] == parent and (bool(parent) or not path)
        return used >= min(FULL_ENOUGH, budget // 2) or not related
    return used + atom.tokens > budget


def _tokens(group: list[_Atom]) -> int:
    return sum(atom.tokens for atom in group)


def _has_body(group: list[_Atom]) -> bool:
    return any(a.kind not in _BODILESS for a in group)


def _trailing_headings(group: list[_Atom]) -> list[_Atom]:
    cut = len(group)
    while cut and group[cut - 1].kind in _BODILESS:
        cut -= 1
    return group[cut:]


def _common_path(atoms: list[_Atom]) -> tuple[str, ...]:
    first = atoms[0].path
    length = len(first)
    for atom in atoms:
        while atom.path[:length] != first[:length]:
            length -= 1
    return first[:length] or first


def _overlap_start(text: str, above: list[_Atom], group: list[_Atom]) -> int:
    """Return where a passage starts if it repeats the last sentences of the prose above it."""
    last, first = above[-1], group[0]
    same = last.path == first.path and last.page == first.page
    if not (same and last.kind == first.kind == "prose"):
        return first.start
    tail = text[last.start : last.end]
    starts = [last.start + m.end() for m in _SENTENCE_END.finditer(tail) if m.end() < len(tail)]
    best = first.start
    for start in reversed(starts):
        if estimate_tokens(text[start : last.end]) > OVERLAP:
            break
        best = start
    return best


def _atoms(document: Document, budget: int) -> Iterable[_Atom]:
    for block in document.blocks:
        text = document.text[block.start : block.end]
        tokens = estimate_tokens(text)
        kind: str = block.kind
        if kind != "heading" and not any(c.isalnum() for c in text) and kind != "code":
            kind = "rule"  # an ornament: never a passage of its own
        if tokens <= budget or kind == "rule":
            before, after = "", ""
            if block.fenced and not _closed(text):
                after = "\n" + _fence_marks(text)[1]
            yield _Atom(
                kind, block.start, block.end, block.heading_path, block.page, tokens, before, after
            )
        elif block.fenced:
            yield from _split_fence(block, text, budget)
        elif kind == "code":
            yield from _pieces(block, text, _cut_lines(text, budget))
        elif kind == "table":
            yield from _split_table(block, text, budget)
        else:
            yield from _pieces(block, text, _cut_prose(text, budget))


def _pieces(block: Block, text: str, spans: list[tuple[int, int]]) -> Iterable[_Atom]:
    """Yield the pieces of a large block; all but the last fill a passage alone."""
    for number, (start, end) in enumerate(spans):
        last = number == len(spans) - 1
        yield _Atom(
            block.kind,
            block.start + start,
            block.start + end,
            block.heading_path,
            block.page,
            estimate_tokens(text[start:end]) if last else _ALONE,
        )


def _fence_marks(text: str) -> tuple[str, str]:
    """Return the opening and the closing line of the fence that starts `text`."""
    match = _OPENING.match(text.split("\n", 1)[0])
    if match is None:
        return "```", "```"
    lead = re.sub(r"[-*+]|\d+[.)]", lambda m: " " * len(m.group()), match.group(1))
    return f"{lead}{match.group(2)}{match.group(3)}".rstrip(), lead + match.group(2)


def _closed(text: str) -> bool:
    lines = text.split("\n")
    mark = _fence_marks(text)[1].strip().lstrip("> ")
    last = lines[-1].strip().lstrip("> ")
    return len(lines) > 1 and len(last) >= len(mark) and set(last) == {mark[0]}


def _split_fence(block: Block, text: str, budget: int) -> Iterable[_Atom]:
    opening, closing = _fence_marks(text)
    head = text.find("\n") + 1
    if not head:
        head = len(text)
    foot = text.rfind("\n") if _closed(text) else len(text)
    spans = [(s + head, e + head) for s, e in _cut_lines(text[head:foot], budget)] or [(head, head)]
    for number, (start, end) in enumerate(spans):
        first, last = number == 0, number == len(spans) - 1
        closed_here = last and _closed(text)
        yield _Atom(
            block.kind,
            block.start + (0 if first else start),
            block.start + (len(text) if last else end),
            block.heading_path,
            block.page,
            estimate_tokens(text[start:end]) if last else _ALONE,
            "" if first else opening + "\n",
            "" if closed_here else "\n" + closing,
        )


def _split_table(block: Block, text: str, budget: int) -> Iterable[_Atom]:
    lines = text.split("\n")
    has_head = len(lines) > 2 and _TABLE_RULE.match(lines[1]) is not None
    head = "\n".join(lines[:2]) + "\n" if has_head else ""
    skip = len(head)
    room = max(40, budget - estimate_tokens(head))
    for number, (start, end) in enumerate(_cut_lines(text[skip:], room)):
        yield _Atom(
            block.kind,
            block.start + (0 if number == 0 else skip + start),
            block.start + skip + end,
            block.heading_path,
            block.page,
            _ALONE,
            "" if number == 0 else head,
        )


def _cut_lines(text: str, budget: int) -> list[tuple[int, int]]:
    """Cut code into spans within the budget, if possible at a blank line or before a definition.

    Spans are without blank lines at their ends. A single line beyond the budget is cut in words.
    """
    rows: list[tuple[int, int, int]] = []
    position = 0
    for line in text.split("\n"):
        tokens = estimate_tokens(line)
        if tokens > budget:
            rows.extend((position + s, position + e, budget) for s, e in _cut_words(line, budget))
        else:
            rows.append((position, position + len(line), tokens))
        position += len(line) + 1
    spans: list[tuple[int, int]] = []
    first = 0
    while first < len(rows):
        last, used = first, rows[first][2]
        while last + 1 < len(rows) and used + rows[last + 1][2] <= budget:
            last += 1
            used += rows[last][2]
        if last + 1 < len(rows):
            last = _best_cut(text, rows, first, last)
        spans.append((rows[first][0], rows[last][1]))
        first = last + 1
    return [(s, e) for s, e in (_trimmed(text, s, e) for s, e in spans) if e > s]


def _best_cut(text: str, rows: list[tuple[int, int, int]], first: int, last: int) -> int:
    """Return the last row of a span: before a blank line, else before an outermost line."""
    lowest = first + (last - first) // 2
    for cut in range(last, lowest, -1):
        after = text[rows[cut + 1][0] : rows[cut + 1][1]]
        if not after.strip():
            return cut
    for cut in range(last, lowest, -1):
        after = text[rows[cut + 1][0] : rows[cut + 1][1]]
        if after[:1].strip() and after[0] not in "})]":
            return cut
    return last


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span without blank lines at its ends; the first line keeps its indentation."""
    blank = _BLANK_LINES.match(text, start, end)
    start = blank.end() if blank else start
    return start, start + len(text[start:end].rstrip())


def _cut_prose(text: str, budget: int) -> list[tuple[int, int]]:
    """Cut prose at sentence ends into spans within the budget."""
    ends = [m.end() for m in _SENTENCE_END.finditer(text)]
    sentences = [
        (s, e) for s, e in zip([0, *ends], [*ends, len(text)], strict=True) if text[s:e].strip()
    ]
    units: list[tuple[int, int]] = []
    for start, end in sentences:
        if estimate_tokens(text[start:end]) > budget:
            units.extend((start + s, start + e) for s, e in _cut_words(text[start:end], budget))
        else:
            units.append((start, end))
    spans: list[tuple[int, int]] = []
    used = 0
    for start, end in units:
        tokens = estimate_tokens(text[start:end])
        if spans and used + tokens <= budget:
            spans[-1] = (spans[-1][0], end)
            used += tokens
        else:
            spans.append((start, end))
            used = tokens
    return [(s, s + len(text[s:e].rstrip())) for s, e in spans]


def _cut_words(text: str, budget: int) -> list[tuple[int, int]]:
    """Cut a run without sentence ends between words or Chinese characters."""
    spans: list[tuple[int, int]] = []
    start, used = 0, 0
    for match in re.finditer(r"[A-Za-z0-9_]{1,60}|\S|\s+", text):
        tokens = estimate_tokens(match.group())
        if used + tokens > budget and match.start() > start:
            spans.append((start, match.start()))
            start, used = match.start(), 0
        used += tokens
    spans.append((start, len(text)))
    return [(s, e) for s, e in spans if text[s:e].strip()]
