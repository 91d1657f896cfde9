"""Set the text files of this folder as PDF handouts under documents/en.

    python rag/sample_course/pdf_source/make_pdf.py

A line that begins with "# " or "## " is a heading, the first one the title; other lines are
paragraphs, parted by empty lines. The result has no date in it, so that the same text always
gives the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Paragraph

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "documents" / "en"

BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=11.5, leading=17, spaceAfter=9)
HEADINGS = [
    ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=20, leading=26, spaceAfter=10),
    ParagraphStyle(
        "chapter", fontName="Helvetica-Bold", fontSize=16, leading=21, spaceBefore=8, spaceAfter=6
    ),
    ParagraphStyle(
        "section",
        fontName="Helvetica-Bold",
        fontSize=13.6,
        leading=18,
        spaceBefore=6,
        spaceAfter=4,
        keepWithNext=1,
    ),
]


class Handout(BaseDocTemplate):
    """A4 pages in one column, with an outline entry for each heading."""

    def __init__(self, path: Path, title: str) -> None:
        super().__init__(str(path), pagesize=A4, title=title, author="Lectern", invariant=1)
        frame = Frame(84, 84, A4[0] - 168, A4[1] - 168, id="column")
        self.addPageTemplates(PageTemplate(frames=[frame], onPageEnd=self.number_page))

    def number_page(self, canvas: Any, document: Any) -> None:
        canvas.setFont("Helvetica", 9)
        canvas.drawCentredString(A4[0] / 2, 40, str(document.page))

    def afterFlowable(self, flowable: Any) -> None:
        names = [style.name for style in HEADINGS]
        style = getattr(flowable, "style", None)
        if style is None or style.name not in names:
            return
        text = flowable.getPlainText()
        self.canv.bookmarkPage(text)
        self.canv.addOutlineEntry(text, text, names.index(style.name))


def make(source: Path, target: Path) -> None:
    """Write `target` (a PDF) from the text in `source`."""
    story = []
    title = ""
    for part in source.read_text("utf-8").split("\n\n"):
        text = " ".join(part.split()).replace("&", "&amp;").replace("<", "&lt;")
        if not text:
            continue
        if not text.startswith("#"):
            story.append(Paragraph(text, BODY))
            continue
        marks, heading = text.split(" ", 1)
        style = HEADINGS[0 if not title else len(marks)]
        title = title or heading
        story.append(Paragraph(heading, style))
    Handout(target, title).build(story)


if __name__ == "__main__":
    for text_file in sorted(HERE.glob("*.txt")):
        make(text_file, TARGET / f"{text_file.stem}.pdf")
