"""Jupyter notebooks: Markdown cells as they are, code cells and their printed output fenced."""

from __future__ import annotations

import json
from typing import Any

from rag.documents.decode import clean
from rag.documents.markdown import markdown_blocks
from rag.documents.model import Document, DocumentError, Limits, TextBuilder, fenced

#: Printed output is evidence, not teaching text: enough of it to find a message again.
_OUTPUT_CHARACTERS = 2_000


def parse_notebook(source: str, stem: str, name: str, limits: Limits) -> Document:
    """Return the document of a notebook of format 3 or 4.

    Raises:
        DocumentError: `broken` if the JSON or its shape is not a notebook's.
    """
    try:
        notebook = json.loads(source)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise DocumentError(
            f"{name} is not a readable notebook: its JSON is broken{place};"
            " open it in Jupyter and save it again.",
            "broken",
        ) from error
    cells = _cells(notebook, name)
    metadata = notebook.get("metadata")
    language = _language(metadata if isinstance(metadata, dict) else {})
    out = TextBuilder(limits, name)
    for cell in cells:
        text = _joined(cell.get("source", cell.get("input", "")))
        kind = cell.get("cell_type")
        if not text.strip():
            continue
        if kind == "code":
            out.add("code", fenced(text, language), language=language, fenced=True)
            printed = _printed(cell.get("outputs"))
            if printed:
                out.add("code", fenced(printed, "text"), language="text", fenced=True)
        elif kind in ("markdown", "heading"):
            if kind == "heading":
                level = cell.get("level")
                if not isinstance(level, int) or not 1 <= level <= 6:
                    level = 1
                text = "#" * level + " " + text
            _add_markdown(out, text.strip("\n").rstrip())
        else:
            out.add("prose", text)
    if not out.blocks:
        raise DocumentError(f"{name} has no cell with text; there is nothing to search.", "no_text")
    heading = next((b.heading_path[-1] for b in out.blocks if b.kind == "heading"), "")
    return Document(heading or stem, out.text(), tuple(out.blocks), "notebook")


def _cells(notebook: Any, name: str) -> list[dict[str, Any]]:
    cells: Any = None
    if isinstance(notebook, dict):
        cells = notebook.get("cells")
        if cells is None and isinstance(notebook.get("worksheets"), list):
            sheets = [s for s in notebook["worksheets"] if isinstance(s, dict)]
            lists = [sheet.get("cells") for sheet in sheets]
            cells = [cell for found in lists if isinstance(found, list) for cell in found]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise DocumentError(
            f"{name} is JSON but not a notebook: it has no list of cells;"
            " save it from Jupyter as .ipynb.",
            "broken",
        )
    return cells


def _add_markdown(out: TextBuilder, text: str) -> None:
    """Add a Markdown cell so that its headings hold on for the cells that follow."""
    blocks = markdown_blocks(text)
    run_start = 0
    for number, block in enumerate(blocks):
        if block.kind != "heading":
            continue
        _add_run(out, text, blocks[run_start:number])
        line = text[block.start : block.end]
        level = len(line) - len(line.lstrip("#"))
        out.add_heading(level or 2, block.heading_path[-1] if block.heading_path else line)
        run_start = number + 1
    _add_run(out, text, blocks[run_start:])


def _add_run(out: TextBuilder, text: str, blocks: list[Any]) -> None:
    if blocks:
        start = blocks[0].start
        moved = [type(b)(b.kind, b.start - start, b.end - start, (), None, b.language, b.fenced)
                 for b in blocks]  # fmt: skip
        out.add_blocks(text[start : blocks[-1].end], moved)


def _joined(source: Any) -> str:
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    return clean(source) if isinstance(source, str) else ""


def _printed(outputs: Any) -> str:
    parts: list[str] = []
    for output in outputs if isinstance(outputs, list) else []:
        if not isinstance(output, dict):
            continue
        data = output.get("data")
        if output.get("output_type") == "stream":
            parts.append(_joined(output.get("text", "")))
        elif isinstance(data, dict):
            parts.append(_joined(data.get("text/plain", "")))
        elif output.get("output_type") == "error":
            parts.append(clean(f"{output.get('ename', 'Error')}: {output.get('evalue', '')}"))
    return "\n".join(part.strip("\n") for part in parts if part.strip())[:_OUTPUT_CHARACTERS]


def _language(metadata: dict[str, Any]) -> str:
    for key, field in (("language_info", "name"), ("kernelspec", "language")):
        value = metadata.get(key)
        if isinstance(value, dict) and isinstance(value.get(field), str):
            return clean(value[field]).lower()[:20]
    return "python"
