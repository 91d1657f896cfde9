"""Retrieval by rag: hybrid course indexes with an embedder of this machine."""

import threading
from collections.abc import Sequence
from pathlib import Path

from backend.documents.retrieval import Hit, IndexPassage, IndexUnusable, OpenIndex, Progress
from rag.embedding import Embedder, EmbedderError, load_embedder
from rag.glossary import Glossary
from rag.index import CourseIndex, EmbedderMismatch, IndexCorrupt, IndexMissing, build
from rag.passages import PassageDraft

_THREADS = 2


class RagRetrieval:
    """One embedder and one glossary for all courses, loaded at the first use."""

    def __init__(self, embedder: str | None, glossary: Path | None) -> None:
        self._name = embedder
        self._glossary_path = glossary
        self._lock = threading.Lock()
        self._loaded: tuple[Embedder, Glossary] | None = None

    def warm_up(self) -> None:
        embedder, _ = self._load()
        embedder.embed_queries(["warm up"])

    def build(self, folder: Path, passages: Sequence[IndexPassage], progress: Progress) -> None:
        embedder, glossary = self._load()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = [
            (p.id, PassageDraft(p.text, p.heading_path, p.page, p.start, p.end), p.title)
            for p in passages
        ]
        build(folder, rows, embedder, glossary, progress)

    def open(self, folder: Path) -> OpenIndex:
        embedder, glossary = self._load()
        try:
            return _Opened(CourseIndex.open(folder, embedder, glossary))
        except (EmbedderMismatch, IndexCorrupt, IndexMissing) as error:
            raise IndexUnusable(str(error)) from error

    def _load(self) -> tuple[Embedder, Glossary]:
        with self._lock:
            if self._loaded is None:
                try:
                    embedder = load_embedder(self._name, threads=_THREADS)
                except EmbedderError as error:
                    raise IndexUnusable(str(error)) from error
                self._loaded = embedder, Glossary.load(self._glossary_path)
            return self._loaded


class _Opened:
    def __init__(self, index: CourseIndex) -> None:
        self._index = index

    def search(self, query: str, k: int) -> list[Hit]:
        return [Hit(hit.passage_id, hit.score) for hit in self._index.search(query, k)]
