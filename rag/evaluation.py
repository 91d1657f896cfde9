"""Measures retrieval: questions whose right passage is known, asked of a fresh index."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rag.documents import Document, DocumentError, is_supported, parse
from rag.embedding import Embedder, Progress
from rag.glossary import Glossary
from rag.index import CourseIndex, build
from rag.index.course import CANDIDATES
from rag.passages import PassageDraft, pack

RECALL_AT = (1, 5, 10)
LEGS = ("hybrid", "bm25", "dense")
_CJK = r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"
_CJK_GAP = re.compile(rf"(?<={_CJK}) | (?={_CJK})")

#: Told about files and questions that count as misses though nothing is wrong with the search.
Warn = Callable[[str], None]


class EvaluationError(ValueError):
    """A folder, file or row that cannot be used; one sentence that says which."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the questions file: any of `answers`, (path, anchor), is a right passage."""

    line: int
    text: str
    answers: tuple[tuple[str, str], ...]
    set: str | None


@dataclass(slots=True)
class Tally:
    """Ranks of the first right passage; None where it is not among the candidates."""

    ranks: list[int | None] = field(default_factory=list)

    def figures(self) -> dict[str, float | int]:
        """Return n, recall at 1, 5 and 10, and mean reciprocal rank."""
        n = len(self.ranks)
        figures: dict[str, float | int] = {"n": n}
        for k in RECALL_AT:
            found = sum(rank is not None and rank <= k for rank in self.ranks)
            figures[f"recall@{k}"] = round(found / n, 4) if n else 0.0
        total = sum(1 / rank for rank in self.ranks if rank is not None)
        figures["mrr"] = round(total / n, 4) if n else 0.0
        return figures


@dataclass(slots=True)
class Report:
    """Tallies by leg and set ("" for all rows), and milliseconds for each hybrid search."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)
    passages: int = 0
    documents: int = 0
    missed: list[Question] = field(default_factory=list)

    def add(self, leg: str, name: str | None, rank: int | None) -> None:
        for key in {"", name or ""}:
            self.tallies.setdefault((leg, key), Tally()).ranks.append(rank)

    def summary(self) -> dict[str, float | int]:
        """Return the figures of the hybrid search over all rows."""
        figures = self.tallies.get(("hybrid", ""), Tally()).figures()
        times = self.milliseconds
        figures["ms_per_query"] = round(sum(times) / len(times), 2) if times else 0.0
        return figures


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a JSON Lines file.

    Raises:
        EvaluationError: the file is missing or empty, or a row is not a question; names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise EvaluationError(f"There is no questions file {file}; check --questions.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"The questions file {file} cannot be read as UTF-8: {error}."
        ) from error
    questions = [
        _question(line, number, file) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not questions:
        raise EvaluationError(f"The questions file {file} holds no question.")
    return questions


def _question(line: str, number: int, file: Path) -> Question:
    where = f"Line {number} of {file}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is not a JSON object: {error}.") from error
    if not isinstance(row, dict):
        raise EvaluationError(f'{where} is not an object with "question", "path" and "anchor".')
    text = _text(row, "question", where)
    answers = [(_path(row, where), _text(row, "anchor", where))]
    others = row.get("alt") or []
    if not isinstance(others, list) or not all(isinstance(other, dict) for other in others):
        raise EvaluationError(f'{where}: "alt" is not a list of objects with "path" and "anchor".')
    answers += [(_path(other, where), _text(other, "anchor", where)) for other in others]
    name = row.get("set")
    if name is not None and not isinstance(name, str):
        raise EvaluationError(f'{where}: "set" is not a text.')
    return Question(number, text, tuple(answers), name)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f'{where} has no text in "{key}".')
    return value


def _path(row: dict[str, Any], where: str) -> str:
    path = PurePosixPath(_text(row, "path", where).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise EvaluationError(f'{where}: "path" {path} does not lie inside the documents folder.')
    return str(path)


def read_documents(folder: Path, warn: Warn, progress: Progress) -> dict[str, Document]:
    """Return the documents of a folder by path; files that cannot be read are only warned about.

    Raises:
        EvaluationError: there is no such folder, or no document in it.
    """
    if not folder.is_dir():
        raise EvaluationError(f"There is no folder {folder}; check --documents.")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )
    documents: dict[str, Document] = {}
    for number, file in enumerate(files, start=1):
        path = file.relative_to(folder).as_posix()
        if is_supported(file.name):
            try:
                documents[path] = parse(file.read_bytes(), file.name)
            except (DocumentError, OSError) as error:
                warn(f"{path} is left out: {error}")
        progress(number, len(files))
    if not documents:
        raise EvaluationError(f"The folder {folder} holds no document that can be read.")
    return documents


def check_questions(
    questions: Sequence[Question],
    documents: dict[str, Document],
    folder: Path,
    file: Path,
    warn: Warn,
) -> None:
    """Compare questions with documents.

    Raises:
        EvaluationError: a row names a file that the folder does not have.
    """
    for question in questions:
        known = False
        for path, anchor in question.answers:
            if path in documents:
                known = known or contains(documents[path].text, anchor)
            elif not (folder / path).is_file():
                raise EvaluationError(
                    f"Line {question.line} of {file} names {path}, which is not in {folder}."
                )
        if not known:
            warn(f"line {question.line}: its anchor is not in the text of its file; a miss")


@dataclass(frozen=True)
class Indexed:
    """Documents as passages in an index; a passage's id is its place in the lists."""

    index: CourseIndex
    drafts: list[tuple[PassageDraft, str]]
    """Each passage and the title of its document."""
    paths: list[str]
    """The path of each passage's document."""
    texts: list[str]
    """Each passage's text, squeezed."""

    @classmethod
    def build(
        cls,
        documents: dict[str, Document],
        embedder: Embedder,
        scratch: Path,
        glossary: Glossary,
        on_embed: Progress | None,
    ) -> Indexed:
        """Index the documents in `scratch`."""
        found = [
            (path, draft, document.title)
            for path, document in documents.items()
            for draft in pack(document)
        ]
        numbered = [(number, draft, title) for number, (_, draft, title) in enumerate(found)]
        build(scratch, numbered, embedder, glossary, on_embed)
        return cls(
            index=CourseIndex.open(scratch, embedder, glossary),
            drafts=[(draft, title) for _, draft, title in found],
            paths=[path for path, _, _ in found],
            texts=[squeezed(draft.text) for _, draft, _ in found],
        )


def evaluate(
    folder: Path,
    questions: Sequence[Question],
    documents: dict[str, Document],
    embedder: Embedder,
    scratch: Path,
    *,
    glossary: Glossary | None = None,
    on_embed: Progress | None = None,
    on_question: Progress | None = None,
) -> Report:
    """Index the documents in `scratch` and ask every question of hybrid, BM25 and dense search."""
    indexed = Indexed.build(documents, embedder, scratch, glossary or Glossary.load(), on_embed)
    index, paths, texts = indexed.index, indexed.paths, indexed.texts
    report = Report(passages=len(texts), documents=len(documents))
    index.search(questions[0].text, 1)  # the model loads before the clock starts
    if on_question is not None:
        on_question(0, len(questions))
    for number, question in enumerate(questions, start=1):
        started = time.perf_counter()
        hits = index.search(question.text, CANDIDATES)
        report.milliseconds.append((time.perf_counter() - started) * 1000)
        forms = index.forms(question.text)
        found = {
            "hybrid": [hit.passage_id for hit in hits],
            "bm25": index.search_sparse(forms, CANDIDATES),
            "dense": index.search_dense(forms, CANDIDATES),
        }
        wanted = [(path, squeezed(anchor)) for path, anchor in question.answers]
        for leg in LEGS:
            rank = next(
                (
                    rank
                    for rank, place in enumerate(found[leg], start=1)
                    if any(paths[place] == p and _holds(texts[place], a) for p, a in wanted)
                ),
                None,
            )
            report.add(leg, question.set, rank)
            if leg == "hybrid" and (rank is None or rank > 5):
                report.missed.append(question)
        if on_question is not None:
            on_question(number, len(questions))
    return report


def squeezed(text: str) -> str:
    """Return `text` with each run of white space as one space."""
    return " ".join(text.split())


def contains(text: str, anchor: str) -> bool:
    """Say whether `text` contains `anchor`, runs of white space counting as one space.

    Spaces beside Chinese characters are layout, not text, and count as nothing if they differ.
    """
    return _holds(squeezed(text), squeezed(anchor))


def _holds(text: str, anchor: str) -> bool:
    return anchor in text or _CJK_GAP.sub("", anchor) in _CJK_GAP.sub("", text)
