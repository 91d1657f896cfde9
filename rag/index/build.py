"""Builds a generation: embed what is new, index everything, swap it in."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag.embedding import Embedder, Progress, Vectors
from rag.glossary import Glossary
from rag.index import files
from rag.index.files import IndexCorrupt, Manifest
from rag.index.forms import dense_document, sparse_document
from rag.index.sparse import SparseIndex
from rag.passages import PassageDraft

#: (number of the passage, the passage, title of its document)
IndexedPassage = tuple[int, PassageDraft, str]


def build(
    folder: Path,
    passages: Sequence[IndexedPassage],
    embedder: Embedder,
    glossary: Glossary | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Build an index of exactly `passages` in `folder` and make it the current generation.

    Embeddings of texts that the generation before holds are taken from it if the embedder is the
    same; `progress(done, total)` counts the texts that really are embedded. Readers see the old
    generation until the new one is complete.

    Raises:
        ValueError: two passages have the same number, or a number is negative.
    """
    import faiss

    glossary = glossary or Glossary.load()
    ids = [number for number, _, _ in passages]
    if len(set(ids)) != len(ids) or any(number < 0 for number in ids):
        raise ValueError("passages need different numbers, none of them negative")
    texts = [
        dense_document(draft, title, glossary, english_only=embedder.english_only)
        for _, draft, title in passages
    ]
    keys = np.array([_digest(text) for text in texts], dtype="S32")
    bodies = np.array([_digest(" ".join(draft.text.split())) for _, draft, _ in passages], "S32")
    with files.writing(folder):
        files.remove_leftovers(folder)
        vectors = _embed(folder, texts, keys, embedder, progress)
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as scratch:
            place = Path(scratch) / "generation"
            place.mkdir()
            index = faiss.IndexIDMap2(faiss.IndexFlatIP(embedder.dim))
            if ids:
                index.add_with_ids(vectors, np.array(ids, dtype=np.int64))
            faiss.write_index(index, str(place / "vectors.faiss"))
            bags = [sparse_document(draft, title, glossary) for _, draft, title in passages]
            SparseIndex.build(ids, bags).save(place)
            np.savez(
                place / "keys.npz", ids=np.array(ids, dtype=np.int64), keys=keys, bodies=bodies
            )
            manifest = Manifest(
                generation=files.next_number(folder),
                embedder=embedder.identity,
                dim=embedder.dim,
                count=len(ids),
                glossary_sha256=glossary.sha256,
                files=files.digests(place),
            )
            files.publish(folder, place, manifest)
    return manifest


def _embed(
    folder: Path,
    texts: Sequence[str],
    keys: NDArray[np.bytes_],
    embedder: Embedder,
    progress: Progress | None,
) -> Vectors:
    vectors = np.zeros((len(texts), embedder.dim), dtype=np.float32)
    known = _known_vectors(folder, embedder)
    first_row: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        if key not in known:
            first_row.setdefault(key, row)
    new = list(first_row.values())
    if new:
        found = embedder.embed_documents([texts[row] for row in new], progress)
        known.update(zip((keys[row] for row in new), found, strict=True))
    for row, key in enumerate(keys):
        vectors[row] = known[key]
    return vectors


def _known_vectors(folder: Path, embedder: Embedder) -> dict[bytes, Vectors]:
    """Return vectors of the current generation by digest of their texts."""
    import faiss

    name = files.current_generation(folder)
    if name is None:
        return {}
    try:
        manifest = files.open_manifest(folder, name)
    except IndexCorrupt:
        return {}  # nothing of it can be trusted: embed everything again
    if dict(manifest.embedder) != embedder.identity or manifest.count == 0:
        return {}
    index = faiss.read_index(str(folder / name / "vectors.faiss"))
    with np.load(folder / name / "keys.npz", allow_pickle=False) as data:
        rows = index.reconstruct_batch(data["ids"])
        return dict(zip(data["keys"], rows, strict=True))


def _digest(text: str) -> bytes:
    # Hex, because numpy drops trailing zero bytes of raw digests; 128 bits are plenty here.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32].encode()
