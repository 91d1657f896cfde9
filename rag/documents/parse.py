"""One door for all formats: check the file, choose the parser, check what came out."""

from __future__ import annotations

from pathlib import PurePosixPath

from rag.documents.decode import clean, decode
from rag.documents.html import parse_html
from rag.documents.markdown import parse_markdown
from rag.documents.model import Document, DocumentError, Limits, too_much_text
from rag.documents.notebook import parse_notebook
from rag.documents.pdf import parse_pdf
from rag.documents.source import (
    LANGUAGES,
    LANGUAGES_BY_NAME,
    TEXT_SUFFIXES,
    parse_source,
    parse_text,
)

_MARKDOWN = frozenset({".md", ".markdown", ".mdown", ".mkd"})
_HTML = frozenset({".html", ".htm", ".xhtml"})
SUPPORTED_SUFFIXES: tuple[str, ...] = (
    *sorted(_MARKDOWN), *sorted(_HTML), ".pdf", ".ipynb", *sorted(TEXT_SUFFIXES),
    *sorted(LANGUAGES),
)  # fmt: skip


def is_supported(name: str) -> bool:
    """Say whether `parse` knows files of this name."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.suffix.lower() in SUPPORTED_SUFFIXES or path.name.lower() in LANGUAGES_BY_NAME


def parse(data: bytes, name: str, limits: Limits | None = None) -> Document:
    """Return the document in `data`, a file called `name` (a path is taken apart).

    Raises:
        DocumentError: one sentence for the person who uploaded the file, and a code.
    """
    limits = limits or Limits()
    path = PurePosixPath(name.replace("\\", "/"))
    name, suffix, stem = path.name, path.suffix.lower(), path.stem
    if not is_supported(name):
        raise DocumentError(
            f"{name or 'The file'} is of a kind that cannot be read; supported are Markdown,"
            f" HTML, PDF, plain text, notebooks and source code: {' '.join(SUPPORTED_SUFFIXES)}.",
            "unsupported",
        )
    if len(data) > limits.bytes:
        raise DocumentError(
            f"{name} is {len(data) / 1e6:.0f} MB large and the limit is"
            f" {limits.bytes / 1e6:.0f} MB; split it into parts.",
            "too_large",
        )
    if not data.strip():
        raise DocumentError(f"{name} is empty; there is nothing to search.", "empty")
    if suffix == ".pdf":
        document = parse_pdf(data, stem, name, limits)
    else:
        text = clean(decode(data, name))
        if not text.strip():
            raise DocumentError(f"{name} is empty; there is nothing to search.", "empty")
        if len(text) > limits.characters and suffix not in _HTML:
            raise too_much_text(name, limits)
        document = _parse_text_format(text, name, suffix, stem, limits)
    if not document.blocks:
        raise DocumentError(f"{name} holds no text to search.", "no_text")
    return document


def _parse_text_format(text: str, name: str, suffix: str, stem: str, limits: Limits) -> Document:
    if name.lower() in LANGUAGES_BY_NAME:
        return parse_source(text, name, LANGUAGES_BY_NAME[name.lower()])
    if suffix in _MARKDOWN:
        return parse_markdown(text, stem)
    if suffix in _HTML:
        return parse_html(text, stem, name, limits)
    if suffix == ".ipynb":
        return parse_notebook(text, stem, name, limits)
    if suffix in TEXT_SUFFIXES:
        return parse_text(text, stem)
    return parse_source(text, name, LANGUAGES[suffix])
