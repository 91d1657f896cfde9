"""Packed shards of training tokens, made by several processes, the same for the same seed.

    python -m serving.demo_model.training.data --tokenizer FOLDER --out FOLDER --shards 400

A shard is a `.npy` file of uint16, [rows, context]. The low 14 bits are the token; bit 14 marks
the first token of a document, bit 15 a token that belongs to an answer. Documents are never cut;
the rest of a row is filled with the end-of-text token, each its own document.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from serving.demo_model.training.corpus import Corpus
from serving.demo_model.training.examples import LECTURES, Example, Maker
from serving.demo_model.training.prompts import END_OF_TEXT

CONTEXT = 4096
ROWS = 256
TOKEN_BITS = 0x3FFF
FIRST = 0x4000
ANSWER = 0x8000
#: So many shards have easy examples.
EASY_SHARDS = 130
#: Rows that are open at a time while documents are packed.
_OPEN = 12
_BATCH = 64


def documents(
    maker: Maker, tokenizer: Tokenizer, rng: Random, context: int
) -> Iterator[NDArray[np.uint16]]:
    """Yield marked token ids of examples without end; what is too long loses its last turns, or is
    left out."""
    while True:
        batch: list[Example] = [maker.example(rng) for _ in range(_BATCH)]
        texts = [text for example in batch for piece in example.pieces() for text in piece]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for example in batch:
            ids: list[int] = []
            fits = True
            for _ in example.pieces():
                read, answer = next(encoded).ids, next(encoded).ids
                fits = fits and len(ids) + len(read) + len(answer) <= context
                if fits:
                    ids += [*read, *(n | ANSWER for n in answer)]
            if len(ids) >= 2:
                made = np.array(ids, dtype=np.uint16)
                made[0] |= FIRST
                yield made


def pack(
    source: Iterator[NDArray[np.uint16]], rows: int, context: int, filler: int
) -> NDArray[np.uint16]:
    """Return [rows, context]: each document goes into the fullest open row that has room."""
    made = np.full((rows, context), filler | FIRST, dtype=np.uint16)
    used = [0] * rows
    open_rows: list[int] = list(range(min(_OPEN, rows)))
    fresh = len(open_rows)
    for ids in source:
        fitting = [r for r in open_rows if used[r] + len(ids) <= context]
        if fitting:
            row = max(fitting, key=lambda r: used[r])
        else:
            fullest = max(open_rows, key=lambda r: used[r])
            open_rows.remove(fullest)
            if fresh < rows:
                open_rows.append(fresh)
                fresh += 1
            if not open_rows:
                return made
            if used[open_rows[-1]] != 0:
                continue
            row = open_rows[-1]
        made[row, used[row] : used[row] + len(ids)] = ids
        used[row] += len(ids)
    return made


def make_shard(
    maker: Maker, tokenizer: Tokenizer, seed: int, number: int, rows: int, context: int
) -> NDArray[np.uint16]:
    """Return shard `number` of the stream with this seed."""
    filler = tokenizer.token_to_id(END_OF_TEXT)
    assert filler is not None
    rng = Random(f"{seed}-{number}")
    maker.easy = number < EASY_SHARDS
    try:
        return pack(documents(maker, tokenizer, rng, context), rows, context, filler)
    finally:
        maker.easy = False


_state: dict[str, Maker | Tokenizer] = {}


def _work(job: tuple[str, int, int, int, int]) -> str:
    out, seed, number, rows, context = job
    file = Path(out) / f"{number:05d}.npy"
    if not file.exists():
        maker, tokenizer = _state["maker"], _state["tokenizer"]
        assert isinstance(maker, Maker)
        assert isinstance(tokenizer, Tokenizer)
        shard = make_shard(maker, tokenizer, seed, number, rows, context)
        partial = file.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as stream:
            np.save(stream, shard)
        partial.rename(file)
    return str(file)


def generate(
    tokenizer: Path,
    out: Path,
    *,
    corpus: Path | None,
    seed: int,
    first: int,
    shards: int,
    workers: int,
    rows: int = ROWS,
    context: int = CONTEXT,
    lectures: float = LECTURES,
) -> Iterator[Path]:
    """Make shards `first` to `first + shards - 1`, yielding each file in order once it is there."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state["maker"] = Maker(Corpus.load(corpus), lectures_share=lectures)
    _state["tokenizer"] = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    jobs = [(str(out), seed, number, rows, context) for number in range(first, first + shards)]
    if workers <= 1:
        yield from (Path(_work(job)) for job in jobs)
        return
    # Forked, so that all processes share one corpus.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from (Path(name) for name in pool.imap(_work, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make training shards.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--lectures", type=float, default=LECTURES, help="share of lecture notes")
    parser.add_argument("--context", type=int, default=CONTEXT)
    a = parser.parse_args()
    files = generate(
        a.tokenizer, a.out, corpus=a.corpus, seed=a.seed, first=a.first, shards=a.shards,
        workers=a.workers, rows=a.rows, context=a.context, lectures=a.lectures,
    )  # fmt: skip
    for file in files:
        print(file, flush=True)
    sys.stdout.close()


if __name__ == "__main__":
    main()
