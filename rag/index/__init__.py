"""Per-course search index: built aside as a generation, swapped in at once, read without locks."""

from rag.index.build import build
from rag.index.course import CourseIndex, Hit, IndexReader, Reranker
from rag.index.files import (
    EmbedderMismatch,
    IndexCorrupt,
    IndexMissing,
    Manifest,
    current_generation,
)

__all__ = [
    "CourseIndex",
    "EmbedderMismatch",
    "Hit",
    "IndexCorrupt",
    "IndexMissing",
    "IndexReader",
    "Manifest",
    "Reranker",
    "build",
    "current_generation",
]
