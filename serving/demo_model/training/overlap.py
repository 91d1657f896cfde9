"""Looks for text of the sample course in what the model is trained on.

    python -m serving.demo_model.training.overlap --corpus FILE

Compared are runs of eight English words and of twelve Chinese characters: long enough that no two
people write one by chance, short enough that no sentence of the course could hide.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from serving.demo_model.training.corpus import Corpus
from serving.demo_model.training.dialogue import TALKS
from serving.demo_model.training.frames import FRAMES
from serving.demo_model.training.lectures import lectures
from serving.demo_model.training.lexicon import GLOSSARY, PARAPHRASES, read_rows

_COURSE = Path(__file__).parents[3] / "rag" / "sample_course"
_TEXTS = (".md", ".txt", ".ipynb", ".jsonl", ".toml", ".c", ".l", ".y", ".g4", ".ll", ".py")
_WORDS, _CHARACTERS = 8, 12


def runs(text: str) -> Iterator[str]:
    """Yield every run of eight words and of twelve Chinese characters of a text."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for start in range(len(words) - _WORDS + 1):
        run = words[start : start + _WORDS]
        if sum(word.isalpha() for word in run) > _WORDS // 2:
            yield " ".join(run)
    for part in re.findall(r"[\u3400-\u9fff]+", re.sub(r"[，。、；：“”（）\s]", "", text)):
        for start in range(len(part) - _CHARACTERS + 1):
            yield part[start : start + _CHARACTERS]


def course_runs() -> set[str]:
    """Return the runs of the sample course: documents, questions, key phrases, and the rest."""
    found: set[str] = set()
    for file in sorted(_COURSE.rglob("*")):
        if not file.is_file() or file.suffix not in _TEXTS or file.name == "README.md":
            continue
        text = file.read_text("utf-8")
        if file.suffix in (".ipynb", ".jsonl"):
            # Strings as they read, not as JSON writes them.
            rows = [text] if file.suffix == ".ipynb" else text.splitlines()
            text = "\n".join(part for row in rows for part in _strings(json.loads(row)))
        found.update(runs(text))
    return found


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        joined = [item for item in value if isinstance(item, str)]
        yield "".join(joined)
        for item in value:
            if not isinstance(item, str):
                yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def training_texts(corpus: Corpus) -> Iterator[str]:
    """Yield every text that examples are put together from."""
    for passage in corpus.passages:
        yield f"{passage.title}\n{passage.heading}\n{passage.body}\n{passage.code}"
    for english, chinese in corpus.pairs:
        yield english
        yield chinese
    for word, meaning in corpus.definitions:
        yield f"{word} {meaning}"
    for lecture in lectures():
        yield lecture.passage.heading + lecture.passage.body
        yield from (question for _, question in lecture.asked)
    for frame in FRAMES:
        yield from (*frame.zh, *frame.en, *frame.ask_zh, *frame.ask_en)
    for asked_zh, asked_en, said_zh, said_en in TALKS:
        yield from (*asked_zh, *asked_en, said_zh, said_en)
    for table in (GLOSSARY, PARAPHRASES):
        for zh, en in read_rows(table):
            yield from (*zh, *en)


def shared(texts: Iterable[str]) -> list[str]:
    """Return the runs of the sample course that occur in texts."""
    course = course_runs()
    return sorted({run for text in texts for run in runs(text) if run in course})


def main() -> None:
    parser = argparse.ArgumentParser(description="Look for the sample course in training text.")
    parser.add_argument("--corpus", type=Path)
    found = shared(training_texts(Corpus.load(parser.parse_args().corpus)))
    for run in found:
        print(run)
    print(f"{len(found)} runs of the sample course are in the training text.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
