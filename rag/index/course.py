"""Searching one course: dense and sparse candidates, fused by rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rag.embedding import Embedder
from rag.glossary import Glossary
from rag.index import files
from rag.index.files import IndexCorrupt, IndexMissing, Manifest
from rag.index.forms import QueryForms, query_forms
from rag.index.sparse import SparseIndex

#: Candidates that each leg gives to the fusion.
CANDIDATES = 50
#: Constant of reciprocal-rank fusion (Cormack, Clarke and Büttcher 2009).
RRF_K = 60
#: Fused candidates that a reranker reads.
RERANKED = 24


class Reranker(Protocol):
    """Gives each passage text a number that grows with its use for the question."""

    def score(self, query: str, texts: Sequence[str]) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found. Ranks count from 1; None means the leg did not find it."""

    passage_id: int
    score: float
    dense_rank: int | None
    sparse_rank: int | None


class CourseIndex:
    """One generation of a course's index, in memory; safe for searches from many threads."""

    def __init__(
        self,
        folder: Path,
        name: str,
        manifest: Manifest,
        embedder: Embedder,
        glossary: Glossary,
    ) -> None:
        import faiss

        self.folder = folder
        self.generation = name
        self.manifest = manifest
        self._embedder = embedder
        self._glossary = glossary
        place = folder / name
        try:
            self._vectors: Any = faiss.read_index(str(place / "vectors.faiss"))
            self._sparse = SparseIndex.load(place)
            with np.load(place / "keys.npz", allow_pickle=False) as data:
                self._bodies: list[bytes] = list(data["bodies"])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise IndexCorrupt(
                f"The index in {place} cannot be read ({error}); index the course again."
            ) from error
        self._ids = self._sparse.ids
        self._places = {int(number): place for place, number in enumerate(self._ids)}

    @classmethod
    def open(
        cls, folder: Path, embedder: Embedder, glossary: Glossary | None = None
    ) -> CourseIndex:
        """Open the current generation after verifying it.

        Raises:
            IndexMissing: nothing was indexed yet.
            IndexCorrupt: files are damaged; index again.
            EmbedderMismatch: another embedder made the index.
        """
        for attempt in range(3):
            name = files.current_generation(folder)
            if name is None:
                raise IndexMissing(
                    f"There is no index in {folder} yet; upload a document or index the course."
                )
            try:
                manifest = files.open_manifest(folder, name)
                files.check_embedder(folder, manifest, embedder.identity)
                return cls(folder, name, manifest, embedder, glossary or Glossary.load())
            except IndexCorrupt:
                # Two builds may have ended since CURRENT was read, and removed what it named.
                if attempt == 2 or files.current_generation(folder) == name:
                    raise
        raise AssertionError("the loop above returns or raises")

    @property
    def is_current(self) -> bool:
        """Say whether no newer generation has been swapped in."""
        return files.current_generation(self.folder) == self.generation

    def search(
        self,
        query: str,
        k: int = 8,
        *,
        live: Collection[int] | None = None,
        removed: Collection[int] = (),
        reranker: Reranker | None = None,
        text_of: Callable[[int], str] | None = None,
    ) -> list[Hit]:
        """Return at most `k` passages for a question, best first.

        Only passages in `live` (if given) and not in `removed` are found, so a deletion shows at
        once, before the index is built again. With a reranker, `text_of` gives it the texts.
        """
        forms = query_forms(query, self._glossary, english_only=self._embedder.english_only)
        allowed = self._allowed(live, removed)
        dense = self.search_dense(forms, CANDIDATES, allowed)
        sparse = self.search_sparse(forms, CANDIDATES, allowed)
        hits = self._without_repeats(fuse(dense, sparse))
        if reranker is not None and text_of is not None and hits:
            hits = _reranked(query, hits, reranker, text_of)
        return hits[:k]

    def search_dense(
        self, forms: QueryForms, k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[int]:
        """Return passage numbers by vector alone; none if the embedder cannot read the question."""
        import faiss

        if forms.dense is None or not forms.dense.strip() or not len(self._ids):
            return []
        vector = self._embedder.embed_queries([forms.dense])
        if not vector.any():
            return []
        parameters = None
        if allowed is not None:
            chosen = self._ids[allowed]
            if not len(chosen):
                return []
            selector: Any = faiss.SearchParameters  # its stub does not know the keyword
            parameters = selector(sel=faiss.IDSelectorBatch(chosen))
        _, found = self._vectors.search(vector, min(k, len(self._ids)), params=parameters)
        return [int(number) for number in found[0] if number >= 0]

    def search_sparse(
        self, forms: QueryForms, k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[int]:
        """Return passage numbers by BM25 alone."""
        found = self._sparse.search(forms.sparse, k, allowed)
        return [int(self._ids[place]) for place, _ in found]

    def forms(self, query: str) -> QueryForms:
        """Return what `search` asks of each leg."""
        return query_forms(query, self._glossary, english_only=self._embedder.english_only)

    def _allowed(
        self, live: Collection[int] | None, removed: Collection[int]
    ) -> NDArray[np.bool_] | None:
        if live is None and not removed:
            return None
        allowed = np.ones(len(self._ids), dtype=np.bool_)
        if live is not None:
            allowed &= np.isin(self._ids, np.fromiter(live, np.int64, len(live)))
        if removed:
            allowed &= ~np.isin(self._ids, np.fromiter(removed, np.int64, len(removed)))
        return allowed

    def _without_repeats(self, hits: list[Hit]) -> list[Hit]:
        """Leave out passages whose text stands higher up already (a handout uploaded twice)."""
        seen: set[bytes] = set()
        kept: list[Hit] = []
        for hit in hits:
            body = self._bodies[self._places[hit.passage_id]]
            if body not in seen:
                seen.add(body)
                kept.append(hit)
        return kept


class IndexReader:
    """Keeps the newest generation of one folder open, for a process that answers questions."""

    def __init__(self, folder: Path, embedder: Embedder, glossary: Glossary | None = None) -> None:
        self._folder = folder
        self._embedder = embedder
        self._glossary = glossary or Glossary.load()
        self._lock = threading.Lock()
        self._open: CourseIndex | None = None

    def get(self) -> CourseIndex:
        """Return the index in its current generation; raises like `CourseIndex.open`."""
        index = self._open
        if index is not None and index.is_current:
            return index
        with self._lock:
            if self._open is None or not self._open.is_current:
                self._open = CourseIndex.open(self._folder, self._embedder, self._glossary)
            return self._open


def fuse(dense: Sequence[int], sparse: Sequence[int]) -> list[Hit]:
    """Fuse two rankings: score = sum of 1 / (60 + rank); with one leg empty, the other's order."""
    dense_ranks = {number: rank for rank, number in enumerate(dense, start=1)}
    sparse_ranks = {number: rank for rank, number in enumerate(sparse, start=1)}
    hits = []
    for number in dict.fromkeys((*dense, *sparse)):
        ranks = (dense_ranks.get(number), sparse_ranks.get(number))
        score = sum(1 / (RRF_K + rank) for rank in ranks if rank is not None)
        hits.append(Hit(number, score, *ranks))
    return sorted(
        hits, key=lambda hit: (-hit.score, hit.dense_rank or 10**6, hit.sparse_rank or 10**6)
    )


def _reranked(
    query: str, hits: list[Hit], reranker: Reranker, text_of: Callable[[int], str]
) -> list[Hit]:
    head, tail = hits[:RERANKED], hits[RERANKED:]
    scores = reranker.score(query, [text_of(hit.passage_id) for hit in head])
    order = sorted(range(len(head)), key=lambda i: -scores[i])
    return [head[i] for i in order] + tail
