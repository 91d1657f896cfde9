"""What every parser produces: a canonical text and blocks that index into it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

BlockKind = Literal["heading", "prose", "code", "table", "list"]


class DocumentError(Exception):
    """A file that cannot become a document.

    `str(error)` is one sentence for a person; `code` is one of `empty`, `too_large`,
    `too_many_pages`, `encrypted`, `no_text`, `wrong_type`, `broken`, `unsupported`.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on what one upload may cost. Bytes, pages and characters."""

    bytes: int = 64 * 1024 * 1024
    pages: int = 2_000
    characters: int = 8_000_000
    #: A page above this is a drawing whose labels are no text to read.
    page_characters: int = 400_000


@dataclass(frozen=True, slots=True)
class Block:
    """`text[start:end]` of the document, without surrounding blank lines.

    `heading_path` names the headings above the block, outermost first; a heading block carries
    its own title as the last element. `page` counts from 1 and is None where a format has no
    pages. `fenced` says that the block's first line opens a Markdown code fence.
    """

    kind: BlockKind
    start: int
    end: int
    heading_path: tuple[str, ...] = ()
    page: int | None = None
    language: str = ""
    fenced: bool = False

    def moved(self, offset: int, above: tuple[str, ...] = ()) -> Block:
        """Return the block as part of a larger text that starts `offset` characters earlier."""
        return replace(
            self,
            start=self.start + offset,
            end=self.end + offset,
            heading_path=above + self.heading_path,
        )


@dataclass(frozen=True, slots=True)
class Document:
    """`text` is what people read and what every span indexes into."""

    title: str
    text: str
    blocks: tuple[Block, ...]
    format: str = "text"
    pages: int | None = None


@dataclass(slots=True)
class TextBuilder:
    """Collects blocks of a format whose canonical text is made here (HTML, PDF, notebooks)."""

    limits: Limits
    name: str
    blocks: list[Block] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)
    _length: int = 0
    _path: list[tuple[int, str]] = field(default_factory=list)

    @property
    def heading_path(self) -> tuple[str, ...]:
        return tuple(title for _, title in self._path)

    @property
    def length(self) -> int:
        return self._length

    def enter_heading(self, level: int, title: str) -> None:
        """Make `title` the innermost heading; headings of the same or a deeper level end."""
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        self._path.append((level, title))

    def add(
        self,
        kind: BlockKind,
        text: str,
        *,
        page: int | None = None,
        language: str = "",
        fenced: bool = False,
    ) -> None:
        """Append one block; blank text is left out."""
        text = text.strip("\n").rstrip()
        if not text.strip():
            return
        start = self._append(text)
        self.blocks.append(
            Block(kind, start, start + len(text), self.heading_path, page, language, fenced)
        )

    def add_heading(
        self, level: int, title: str, *, page: int | None = None, marks: bool = True
    ) -> None:
        """Append a heading, written with `#` marks if `marks`."""
        title = " ".join(title.split())
        if title:
            self.enter_heading(level, title)
            self.add("heading", f"{'#' * level} {title}" if marks else title, page=page)

    def add_blocks(self, text: str, blocks: list[Block]) -> None:
        """Append a text that another parser has cut into blocks, under the present heading."""
        if blocks:
            start = self._append(text.rstrip())
            self.blocks.extend(block.moved(start, self.heading_path) for block in blocks)

    def _append(self, text: str) -> int:
        if self._parts:
            self._parts.append("\n\n")
            self._length += 2
        start = self._length
        self._parts.append(text)
        self._length += len(text)
        if self._length > self.limits.characters:
            raise too_much_text(self.name, self.limits)
        return start

    def text(self) -> str:
        return "".join(self._parts)


def too_much_text(name: str, limits: Limits) -> DocumentError:
    return DocumentError(
        f"{name} holds more than {limits.characters:,} characters of text; split it into parts.",
        "too_large",
    )


def fence_for(code: str) -> str:
    """Return a run of backticks longer than any that starts a line of `code`."""
    longest = 2
    for line in code.splitlines():
        stripped = line.lstrip()
        longest = max(longest, len(stripped) - len(stripped.lstrip("`")))
    return "`" * (longest + 1)


def fenced(code: str, language: str) -> str:
    mark = fence_for(code)
    return f"{mark}{language}\n{code.strip(chr(10))}\n{mark}"


def fill_gaps(text: str, blocks: list[Block]) -> list[Block]:
    """Return `blocks` with prose blocks where text stands between them, so nothing is lost."""
    filled: list[Block] = []
    position = 0
    for block in blocks:
        if block.start < position:
            if block.end <= position:
                continue
            block = replace(block, start=position)
        _add_gap(text, position, block.start, filled)
        filled.append(block)
        position = block.end
    _add_gap(text, position, len(text), filled)
    return filled


def _add_gap(text: str, start: int, end: int, filled: list[Block]) -> None:
    gap = text[start:end]
    if gap.strip():
        begin = start + len(gap) - len(gap.lstrip())
        path = filled[-1].heading_path if filled else ()
        page = filled[-1].page if filled else None
        filled.append(Block("prose", begin, begin + len(gap.strip()), path, page))
