"""PDF: pdfium reads the text with its fonts and places; pypdf reads it where pdfium cannot."""

from __future__ import annotations

import ctypes
import io
import re
import statistics
import threading
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from rag.documents.decode import clean, real_type
from rag.documents.model import Document, DocumentError, Limits, TextBuilder

_MONOSPACED = re.compile(r"mono|courier|consol|menlo|typewriter|cmtt|inconsol|fixed|code", re.I)
_BULLET = re.compile(r"^\s*(?:[•◦▪‣●○■□–·*-]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+\S")
_CJK = r"\u3000-\u303f\u3400-\u9fff\uff00-\uffef"
#: pdfium is not thread-safe: one document at a time in a process.
_PDFIUM = threading.Lock()


@dataclass(slots=True)
class _Line:
    text: str
    size: float = 0.0
    left: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    mono: bool = False
    #: Mean width of a character, in points.
    width: float = 0.0


def parse_pdf(data: bytes, stem: str, name: str, limits: Limits) -> Document:
    """Return the document of a PDF, every block with its page.

    Lines that repeat at the edge of most pages (running titles, page numbers) are left out;
    larger type and the outline make headings, monospaced type makes code.

    Raises:
        DocumentError: `wrong_type`, `encrypted`, `broken`, `too_many_pages`, `no_text`.
    """
    if b"%PDF-" not in data[:1024]:
        kind = real_type(data) or "no PDF file"
        raise DocumentError(
            f"{name} is {kind} although its name ends in .pdf; upload it under its right name.",
            "wrong_type",
        )
    pages, title, outline = _read(data, name, limits)
    _drop_running_lines(pages)
    out = TextBuilder(limits, name)
    body_size = _body_size(pages)
    for number, lines in enumerate(pages, start=1):
        _add_page(out, lines, number, body_size, outline.get(number, []))
    text = out.text()
    if not any(character.isalnum() for character in text):
        raise DocumentError(
            f"{name} has {len(pages)} pages but no text in them, so it is probably a scan;"
            " run text recognition (OCR) on it and upload the result.",
            "no_text",
        )
    return Document(_title(title, stem), text, tuple(out.blocks), "pdf", len(pages))


def _read(
    data: bytes, name: str, limits: Limits
) -> tuple[list[list[_Line]], str, dict[int, list[tuple[int, str]]]]:
    """Return lines by page, the title, and outline entries (level, title) by page."""
    import pypdfium2
    import pypdfium2.raw as raw

    with _PDFIUM:
        try:
            pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if raw.FPDF_GetLastError() == raw.FPDF_ERR_PASSWORD or "password" in str(error).lower():
                raise _encrypted(name) from error
            pdf = None
        if pdf is not None:
            try:
                _check_pages(len(pdf), name, limits)
                pages = [_read_page(pdf, number, name, limits) for number in range(len(pdf))]
                title = pdf.get_metadata_value("Title")
                return pages, title, _outline(pdf)
            except pypdfium2.PdfiumError:
                pass  # a page that pdfium cannot load: the other reader may
            finally:
                pdf.close()
    return _read_with_pypdf(data, name, limits)


def _check_pages(count: int, name: str, limits: Limits) -> None:
    if count > limits.pages:
        raise DocumentError(
            f"{name} has {count:,} pages and the limit is {limits.pages:,}; split it into parts.",
            "too_many_pages",
        )
    if count == 0:
        raise DocumentError(f"{name} has no pages; export it again.", "broken")


def _encrypted(name: str) -> DocumentError:
    return DocumentError(
        f"{name} is protected by a password; upload a copy without one.", "encrypted"
    )


def _read_page(pdf: object, number: int, name: str, limits: Limits) -> list[_Line]:
    page = pdf[number]  # type: ignore[index]
    try:
        text_page = page.get_textpage()
        try:
            count = text_page.count_chars()
            if count > limits.page_characters:
                raise DocumentError(
                    f"Page {number + 1} of {name} holds {count:,} characters and the limit is"
                    f" {limits.page_characters:,}; upload the document without that page.",
                    "too_large",
                )
            return _lines(text_page, count)
        finally:
            text_page.close()
    finally:
        page.close()


def _lines(text_page: object, count: int) -> list[_Line]:
    """Cut a page at the line ends that pdfium finds; a line's type is that of its characters."""
    import pypdfium2.raw as raw

    handle = text_page.raw  # type: ignore[attr-defined]
    lines: list[_Line] = []
    characters: list[str] = []
    indexes: list[int] = []

    def end_line() -> None:
        text = "".join(characters)
        if text.strip():
            lines.append(_measured(handle, text, indexes))
        elif lines and lines[-1].text:
            lines.append(_Line(""))
        characters.clear()
        indexes.clear()

    high = 0
    for index in range(count):
        code = raw.FPDFText_GetUnicode(handle, index)
        if 0xD800 <= code < 0xDC00:
            high = code
            continue
        if 0xDC00 <= code < 0xE000 and high:
            code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00)
        high = 0
        if code in (0x0A, 0x0D):
            if code == 0x0A:
                end_line()
        elif code in (0x02, 0xAD, 0xFFFE):
            characters.append("\u00ad")  # a hyphen at a line end: joined or kept below
        elif code not in (0, 0xFFFF):
            character = chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"
            characters.append(character)
            if not character.isspace():
                indexes.append(index)
    end_line()
    return lines


def _measured(handle: object, text: str, indexes: list[int]) -> _Line:
    import pypdfium2.raw as raw

    line = _Line(clean(text).rstrip())
    if not indexes:
        return line
    first, middle = indexes[0], indexes[len(indexes) // 2]
    rect = raw.FS_RECTF()
    if raw.FPDFText_GetLooseCharBox(handle, first, rect):
        line.left, line.top, line.bottom = rect.left, rect.top, rect.bottom
    line.size = abs(line.top - line.bottom) or raw.FPDFText_GetFontSize(handle, middle)
    if raw.FPDFText_GetLooseCharBox(handle, indexes[-1], rect):
        line.width = max(0.0, rect.right - line.left) / len(line.text.strip())
    fonts = [_font(handle, index) for index in {first, middle, indexes[-1]}]
    line.mono = all(_MONOSPACED.search(font) for font in fonts)
    return line


def _font(handle: object, index: int) -> str:
    import pypdfium2.raw as raw

    buffer = ctypes.create_string_buffer(128)
    flags = ctypes.c_int()
    length = raw.FPDFText_GetFontInfo(handle, index, buffer, 128, flags)
    name = buffer.raw[: max(0, min(length, 128) - 1)].decode("utf-8", "replace")
    return name + (" mono" if flags.value & 1 else "")  # bit 1: fixed pitch


def _outline(pdf: object) -> dict[int, list[tuple[int, str]]]:
    found: dict[int, list[tuple[int, str]]] = {}
    for entry in pdf.get_toc(max_depth=6):  # type: ignore[attr-defined]
        target = entry.get_dest()
        index = target.get_index() if target is not None else None
        title = " ".join(entry.get_title().split())
        if index is not None and title:
            found.setdefault(index + 1, []).append((entry.level + 1, title))
    return found


def _read_with_pypdf(
    data: bytes, name: str, limits: Limits
) -> tuple[list[list[_Line]], str, dict[int, list[tuple[int, str]]]]:
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise _encrypted(name)
        _check_pages(len(reader.pages), name, limits)
        pages = [
            [
                _Line(line)
                for line in clean(page.extract_text())[: limits.page_characters].split("\n")
            ]
            for page in reader.pages
        ]
        title = str((reader.metadata.title if reader.metadata else None) or "")
    except DocumentError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            RecursionError, OSError) as error:  # fmt: skip
        raise DocumentError(
            f"{name} is damaged and no page of it can be read; export it again.", "broken"
        ) from error
    return pages, title, {}


def _drop_running_lines(pages: list[list[_Line]]) -> None:
    """Remove the first and last lines that most pages share, page numbers put aside."""

    def key(line: _Line) -> str:
        return re.sub(r"\d+", "#", " ".join(line.text.split()))

    filled = [page for page in pages if any(line.text.strip() for line in page)]
    if len(filled) < 4:
        return
    counts: Counter[str] = Counter()
    for page in filled:
        solid = [line for line in page if line.text.strip()]
        counts.update({key(line) for line in (*solid[:2], *solid[-2:])})
    running = {k for k, n in counts.items() if n > len(filled) * 0.6 and len(k) <= 120}
    for page in pages:
        solid = [line for line in page if line.text.strip()]
        edge = {id(line) for line in (*solid[:2], *solid[-2:]) if key(line) in running}
        if len(edge) < len(solid):
            page[:] = [line for line in page if id(line) not in edge]


def _body_size(pages: list[list[_Line]]) -> float:
    sizes: Counter[float] = Counter()
    for page in pages:
        for line in page:
            if line.size:
                sizes[round(line.size, 1)] += len(line.text)
    return sizes.most_common(1)[0][0] if sizes else 0.0


def _add_page(
    out: TextBuilder,
    lines: list[_Line],
    page: int,
    body_size: float,
    outline: list[tuple[int, str]],
) -> None:
    gap = _usual_gap(lines)
    titles = {_squeezed(title): (level, title) for level, title in outline}
    entered = {_squeezed(line.text) for line in lines}
    for key, (level, title) in titles.items():
        if key not in entered:
            out.enter_heading(level, title)
    paragraph: list[_Line] = []
    for number, line in enumerate(lines):
        level = _heading_level(line, lines, number, body_size, titles)
        above = lines[number - 1] if number else None
        if level or _starts_paragraph(line, above, gap, body_size):
            _add_paragraph(out, paragraph, page)
            paragraph = []
        if level:
            known = titles.get(_squeezed(line.text))
            out.add_heading(level, known[1] if known else line.text, page=page, marks=False)
        elif line.text.strip():
            paragraph.append(line)
    _add_paragraph(out, paragraph, page)


def _squeezed(text: str) -> str:
    return re.sub(r"\W+", "", text).lower()


def _usual_gap(lines: list[_Line]) -> float:
    """Return the usual distance between the tops of neighbouring lines, in points."""
    gaps = [
        above.top - line.top
        for above, line in pairwise(lines)
        if above.size and line.size and 0 < above.top - line.top < 4 * line.size
    ]
    return statistics.median_low(gaps) if gaps else 0.0


def _heading_level(
    line: _Line,
    lines: list[_Line],
    number: int,
    body_size: float,
    titles: dict[str, tuple[int, str]],
) -> int:
    text = line.text.strip()
    known = titles.get(_squeezed(text))
    if known:
        return known[0]
    if not text or line.mono or len(text) > 90 or not any(c.isalpha() for c in text):
        return 0
    if not body_size or line.size < body_size * 1.15 or _BULLET.match(text):
        return 0
    if text.endswith((".", "。", "，", ",", ";", "；")):
        return 0
    return 1 if line.size >= body_size * 1.6 else 2 if line.size >= body_size * 1.3 else 3


def _starts_paragraph(line: _Line, above: _Line | None, gap: float, body_size: float) -> bool:
    if above is None or not above.text.strip():
        return True
    if line.mono != above.mono or (_BULLET.match(line.text) and not line.mono):
        return True
    if line.mono or not (line.size and above.size and gap):
        return False
    step = above.top - line.top
    return step > gap * 1.35 or step < -body_size


def _add_paragraph(out: TextBuilder, lines: list[_Line], page: int) -> None:
    if not lines:
        return
    if all(line.mono for line in lines):
        out.add("code", _code(lines), page=page)
        return
    text = "\n".join(line.text.strip() for line in lines)
    # A soft hyphen at a line end joins its word; elsewhere it cannot be seen.
    text = re.sub("\u00ad\\s*\n\\s*", "", text).replace("\u00ad\n", "").replace("\u00ad", "-")
    # Chinese has no spaces: a line end between two Chinese characters is none either.
    text = re.sub(rf"(?<=[{_CJK}])\n(?=[{_CJK}])", "", text)
    out.add("list" if _BULLET.match(text) else "prose", text, page=page)


def _code(lines: list[_Line]) -> str:
    """Return code lines with the indentation that their place on the page shows."""
    edge = min(line.left for line in lines)
    width = statistics.median_low([line.width for line in lines]) or 1.0
    return "\n".join(
        " " * min(40, max(0, round((line.left - edge) / width)))
        + line.text.strip().replace("\u00ad", "-")
        for line in lines
    )


def _title(title: str, stem: str) -> str:
    title = " ".join(clean(title or "").split())
    useless = re.match(r"(?i)^(untitled|microsoft |powerpoint|slide \d|anonymous|\W*$)", title)
    return stem if not title or useless or len(title) > 200 else title
