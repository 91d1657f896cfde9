"""The collected text in memory: passages as a course would have them, and a search over them."""

from __future__ import annotations

import ast
import json
import lzma
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from heapq import nlargest
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.demo_model.training.lexicon import HAN, STOPWORDS, WORD, base_forms

_ROOT = Path(__file__).parents[3]
#: Name of the file of pairs that lies beside the collected text.
NEAR = "near.npz"
#: Own prose that is read, beside docstrings. The sample course and the tests are never read.
OWN_TEXTS = ("README.md", "README.zh-CN.md", "docs/architecture.md")
OWN_CODE = ("serving", "backend", "rag", "monitoring", "deploy", "web")
_SENTENCE_EN = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"'(\[])")
_SENTENCE_ZH = re.compile(r"(?<=[。！？；])")
#: The points of a list begin a sentence too.
_POINT = re.compile(r"\n(?=(?:-|\d+[.)]) )")


@dataclass(frozen=True, slots=True)
class Passage:
    """A section: sentences in paragraphs, perhaps code behind them.

    `body` is the text of the passage; each sentence is a (start, end) of it, and `paragraph`
    gives for each sentence the number of its paragraph.
    """

    group: str
    title: str
    heading: str
    body: str
    spans: tuple[tuple[int, int], ...]
    paragraph: tuple[int, ...]
    chinese: bool = False
    code: str = ""

    def sentence(self, number: int) -> str:
        start, end = self.spans[number]
        return self.body[start:end]

    def window(self, number: int, most: int = 4) -> str:
        """Return a sentence with the one before it in its paragraph and what follows, `most`
        (at least two) sentences in all: of neighbours it is often hard to say which one answers.
        """
        own = [n for n, p in enumerate(self.paragraph) if p == self.paragraph[number]]
        first = max(own[0], number - 1)
        last = min(own[-1], first + most - 1)
        return self.body[self.spans[first][0] : self.spans[last][1]].rstrip()

    def without(self, number: int) -> Passage:
        """Return the passage with one sentence cut out."""
        start, end = self.spans[number]
        gap = self.spans[number + 1][0] if number + 1 < len(self.spans) else len(self.body)
        end = max(end, gap)
        spans = [
            (s, e) if e <= start else (s - (end - start), e - (end - start))
            for i, (s, e) in enumerate(self.spans)
            if i != number
        ]
        paragraphs = tuple(p for i, p in enumerate(self.paragraph) if i != number)
        body = self.body[:start] + self.body[end:]
        return Passage(self.group, self.title, self.heading, body, tuple(spans), paragraphs,
                       self.chinese, self.code)  # fmt: skip


def make_passage(
    group: str, title: str, heading: str, paragraphs: Sequence[str], code: str = ""
) -> Passage:
    """Put paragraphs together and find their sentences.

    A paragraph may be a list whose points are lines that begin with a dash or a number.
    """
    body = ""
    spans: list[tuple[int, int]] = []
    numbers: list[int] = []
    chinese = bool(HAN.search("".join(paragraphs)))
    for number, paragraph in enumerate(paragraphs):
        body += ("\n\n" if body else "") + paragraph
        place = len(body) - len(paragraph)
        cut = _SENTENCE_ZH if HAN.search(paragraph) else _SENTENCE_EN
        for sentence in (s for point in _POINT.split(paragraph) for s in cut.split(point)):
            if sentence.strip():
                start = body.index(sentence, place)
                spans.append((start, start + len(sentence)))
                numbers.append(number)
                place = start + len(sentence)
    return Passage(group, title, heading, body, tuple(spans), tuple(numbers), chinese, code)


Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Near:
    """Pairs of texts that say nearly the same: what is asked about, and where that is answered.

    `counts` [2]: passages and message pairs of the corpus that the numbers belong to.
    `sentences` [n, 4]: passage and place of a sentence, passage and place of the answer.
    `messages` [n, 2]: places in `Corpus.pairs`. `across` [n, 3]: a place in `Corpus.pairs`,
    passage and place of the answer. `beside` [n, m]: passages that may answer `sentences` too,
    filled up with -1.
    """

    counts: Numbers
    sentences: Numbers
    messages: Numbers
    across: Numbers
    beside: Numbers

    @classmethod
    def load(cls, file: Path) -> Near:
        with np.load(file, allow_pickle=False) as saved:
            return cls(**{entry.name: saved[entry.name] for entry in fields(cls)})

    def save(self, file: Path) -> None:
        np.savez_compressed(file, **{e.name: getattr(self, e.name) for e in fields(self)})


@dataclass(slots=True)
class Corpus:
    """Everything that examples are made from."""

    passages: list[Passage] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    #: Runs of messages of one program: (first, last) places in `pairs`.
    runs: list[tuple[int, int]] = field(default_factory=list)
    synonyms: list[list[str]] = field(default_factory=list)
    definitions: list[tuple[str, str]] = field(default_factory=list)
    characters: list[tuple[str, str]] = field(default_factory=list)
    #: How many of the passages were collected; the project's own come behind them.
    collected: int = 0
    near: Near | None = None

    @classmethod
    def load(cls, file: Path | None) -> Corpus:
        """Read the collected file (None: own text only), the project's own prose, and pairs.

        Raises:
            ValueError: the pairs beside the file were found in another corpus.
        """
        corpus = cls()
        if file is not None:
            with lzma.open(file, "rt", encoding="utf-8") as lines:
                corpus._read(lines)
            corpus.collected = len(corpus.passages)
            if (near := file.with_name(NEAR)).is_file():
                corpus.near = Near.load(near)
                if corpus.near.counts.tolist() != [corpus.collected, len(corpus.pairs)]:
                    raise ValueError(f"{near} belongs to another corpus; make it again.")
        corpus.passages.extend(own_passages())
        return corpus

    def _read(self, lines: Iterable[str]) -> None:
        program, first = "", 0
        for line in lines:
            row = json.loads(line)
            kind = row["k"]
            if kind == "doc":
                self.passages.extend(_sections(row))
            elif kind == "pair":
                if row["p"] != program:
                    self.runs.append((first, len(self.pairs)))
                    program, first = row["p"], len(self.pairs)
                self.pairs.append((row["en"], row["zh"]))
            elif kind == "word":
                group = [w for w in (*row["w"], *row["a"]) if " " not in w]
                if len(group) > 1:
                    self.synonyms.append(group)
                if row["g"]:
                    self.definitions.append((row["w"][0], row["g"]))
            else:
                self.characters.append((row["zh"], row["en"]))
        self.runs.append((first, len(self.pairs)))
        self._keep_common_synonyms()
        self.runs = [(a, b) for a, b in self.runs if b - a >= 8]

    def _keep_common_synonyms(self) -> None:
        """Leave out synonyms that technical prose hardly uses: they are of another sense."""
        counts = Counter(w.lower() for p in self.passages for w in WORD.findall(p.body))
        groups = [[w for w in group if counts[w] >= 20] for group in self.synonyms]
        self.synonyms = [group for group in groups if len(group) > 1]


def _sections(row: dict[str, Any]) -> list[Passage]:
    """Cut a section into passages of 200 to 900 characters at its paragraphs."""
    made: list[Passage] = []
    kept: list[str] = []
    paragraphs = [str(p) for p in row["b"]]
    code = [str(c) for c in row["c"]]
    group, title, heading = str(row["p"]) + str(row["t"]), str(row["t"]), str(row["h"])

    def put() -> None:
        if sum(map(len, kept)) >= 120:
            block = code[0] if code and not made and len(code[0]) < 400 else ""
            made.append(make_passage(group, title, heading, kept, block))
        kept.clear()

    for paragraph in paragraphs:
        if kept and sum(map(len, kept)) + len(paragraph) > 800:
            put()
        if len(paragraph) <= 1000:
            kept.append(paragraph)
    put()
    return made


def own_passages() -> list[Passage]:
    """Return the project's own documentation and docstrings as passages."""
    made: list[Passage] = []
    for name in OWN_TEXTS:
        file = _ROOT / name
        if not file.is_file():
            continue
        title, heading = name, name
        for block in re.split(
            r"\n\s*\n", re.sub(r"```.*?```", "", file.read_text("utf-8"), flags=re.S)
        ):
            text = " ".join(block.split())
            if text.startswith("#"):
                heading = text.lstrip("# ")
            elif len(text) > 100 and not text.startswith(("|", "-", "!", "<")):
                made.append(make_passage(name, title, heading, [text[:900]]))
    for folder in OWN_CODE:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            if {"sample_course", "tests"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    continue
                text = ast.get_docstring(node) or ""
                prose = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
                prose = [p for p in prose if 80 < len(p) < 800 and p.endswith(".")]
                if prose:
                    name = getattr(node, "name", file.stem)
                    path = file.relative_to(_ROOT).as_posix()
                    made.append(make_passage(path, path, name, prose[:2]))
    return made


class Search:
    """Finds passages that share rare words with a question: the hard wrong ones."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        lists: defaultdict[str, list[int]] = defaultdict(list)
        self.words: list[frozenset[str]] = []
        for number, passage in enumerate(passages):
            words = content(passage.heading + " " + passage.body)
            self.words.append(words)
            for word in sorted(words):
                lists[word].append(number)
        total = max(len(passages), 2)
        self.weight = {w: math.log(total / len(p)) for w, p in lists.items()}
        self._lists = {w: p for w, p in lists.items() if len(p) <= max(40, total // 40)}
        self.groups: defaultdict[str, list[int]] = defaultdict(list)
        for number, passage in enumerate(passages):
            self.groups[passage.group].append(number)

    def rank(self, words: Iterable[str], rng: Random, most: int) -> list[int]:
        """Return the passages with the greatest weight of shared words, best first."""
        score: defaultdict[int, float] = defaultdict(float)
        for word in sorted(words):
            found = self._lists.get(word, [])
            weight = self.weight.get(word, 0.0)
            if len(found) > 400:
                found = rng.sample(found, 400)
            for number in found:
                score[number] += weight
        return nlargest(most, score, key=score.__getitem__)

    def overlap(self, words: Iterable[str], number: int) -> float:
        """Return the share of the question's weight that a passage has."""
        whole = part = 0.0
        for word in words:
            weight = self.weight.get(word, 9.0)
            whole += weight
            part += weight if word in self.words[number] else 0.0
        return part / whole if whole else 0.0


def content(text: str) -> frozenset[str]:
    """Return the stems of English content words and the pairs of Chinese characters."""
    words = {
        min(base_forms(w), key=len)
        for w in WORD.findall(text)
        if len(w) > 2 and w.lower() not in STOPWORDS
    }
    if HAN.search(text):
        for run in re.findall(r"[\u3400-\u9fff]+", text):
            words.update(run[i : i + 2] for i in range(len(run) - 1))
    return frozenset(words)
