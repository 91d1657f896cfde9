"""BM25 over weighted words, as arrays: scores are computed when the index is built.

Formula: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009),
with the idf that stays positive, log(1 + (N - n + 0.5) / (n + 0.5)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

K1 = 1.2
B = 0.75


class SparseIndex:
    """Postings by word. `ids` are passage numbers; rows of all arrays refer to places in `ids`."""

    def __init__(
        self,
        ids: NDArray[np.int64],
        terms: Mapping[str, int],
        starts: NDArray[np.int64],
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> None:
        self.ids = ids
        self._terms = terms
        self._starts = starts
        self._rows = rows
        self._scores = scores

    @classmethod
    def build(cls, ids: Sequence[int], bags: Sequence[Mapping[str, float]]) -> SparseIndex:
        """Build from one bag of weighted words for each passage."""
        postings: dict[str, list[tuple[int, float]]] = {}
        lengths = np.zeros(len(bags), dtype=np.float64)
        for row, bag in enumerate(bags):
            lengths[row] = sum(bag.values())
            for word, weight in bag.items():
                postings.setdefault(word, []).append((row, weight))
        mean = float(lengths.mean()) if len(bags) else 0.0
        norm = K1 * (1 - B + B * lengths / mean) if mean else lengths
        starts = np.zeros(len(postings) + 1, dtype=np.int64)
        rows: list[NDArray[np.int32]] = []
        scores: list[NDArray[np.float32]] = []
        terms: dict[str, int] = {}
        for number, word in enumerate(sorted(postings)):
            found = postings[word]
            at = np.array([row for row, _ in found], dtype=np.int32)
            tf = np.array([weight for _, weight in found], dtype=np.float64)
            idf = np.log1p((len(bags) - len(found) + 0.5) / (len(found) + 0.5))
            rows.append(at)
            scores.append((idf * tf * (K1 + 1) / (tf + norm[at])).astype(np.float32))
            starts[number + 1] = starts[number] + len(found)
            terms[word] = number
        return cls(
            np.array(ids, dtype=np.int64),
            terms,
            starts,
            np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32),
            np.concatenate(scores) if scores else np.zeros(0, dtype=np.float32),
        )

    def search(
        self, words: Mapping[str, float], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> list[tuple[int, float]]:
        """Return at most `k` (place in `ids`, score), best first, equal scores in order of place.

        Only passages with at least one of the words, and with `allowed`, if given, are found.
        """
        totals = np.zeros(len(self.ids), dtype=np.float32)
        for word, weight in words.items():
            number = self._terms.get(word)
            if number is not None:
                part = slice(self._starts[number], self._starts[number + 1])
                # A word has at most one posting in a passage, so no row occurs twice here.
                totals[self._rows[part]] += weight * self._scores[part]
        if allowed is not None:
            totals[~allowed] = 0.0
        found = np.flatnonzero(totals > 0)
        best = found[np.lexsort((found, -totals[found]))[:k]]
        return [(int(row), float(totals[row])) for row in best]

    def save(self, place: Path) -> None:
        with (place / "terms.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(
                f"{word}\n" for word in sorted(self._terms, key=self._terms.__getitem__)
            )
        np.savez(
            place / "sparse.npz",
            ids=self.ids,
            starts=self._starts,
            rows=self._rows,
            scores=self._scores,
        )

    @classmethod
    def load(cls, place: Path) -> SparseIndex:
        text = (place / "terms.txt").read_text(encoding="utf-8")
        words = text.split("\n")[:-1]
        with np.load(place / "sparse.npz", allow_pickle=False) as data:
            return cls(
                data["ids"],
                {word: number for number, word in enumerate(words)},
                data["starts"],
                data["rows"],
                data["scores"],
            )
