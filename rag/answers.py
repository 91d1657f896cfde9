"""Measures answers: questions asked end to end, through retrieval, prompt and an engine.

The passages of each question are shown in an order shuffled by a fixed seed, so that a model that
always cites the first one gains nothing by retrieval's having put the best one there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from rag.citations import find
from rag.documents import Document
from rag.embedding import Embedder, Progress
from rag.evaluation import EvaluationError, Indexed, Question, contains
from rag.glossary import Glossary
from rag.passages import estimate_tokens
from rag.prompt import CountTokens, Language, Message, PromptPassage, build_prompt
from rag.tokens import has_cjk

#: Tokens left for an answer, and shown as its longest.
ANSWER_TOKENS = 256
_REFUSALS = re.compile(
    r"do(?:es)? not (?:answer|contain|say|mention|cover)|don't (?:answer|contain|say|mention)"
    r"|doesn't (?:answer|contain|say|mention)|no (?:answer|passage|information)"
    r"|(?:not|n't) (?:find|found|answered|mentioned|covered)|cannot (?:answer|be answered)"
    r"|没有(?:回答|提到|提及|说明|给出|找到|涉及|包含|这个问题|相关|答案|关于)|未(?:提及|提到|涉及|说明|找到)"
    r"|(?:无法|不能)回答|找不到"
)


class Model(Protocol):
    """What answers: an engine behind its HTTP API, or a stand-in in tests."""

    context_tokens: int

    def count(self, messages: list[Message]) -> int: ...

    def answer(self, messages: list[Message], max_tokens: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to be answered: `answers` empty for one that the documents do not answer."""

    text: str
    answers: tuple[tuple[str, str], ...]
    key_phrase: str
    set: str


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt: `right` are the numbers of shown passages that answer its question."""

    asked: Asked
    messages: list[Message]
    right: tuple[int, ...]
    shown: int

    def row(self) -> dict[str, Any]:
        """Return what a file of prompts says of it."""
        return {
            "set": self.asked.set,
            "question": self.asked.text,
            "key_phrase": self.asked.key_phrase,
            "answerable": bool(self.asked.answers),
            "right": list(self.right),
            "messages": self.messages,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What a model said to a case, and what that is worth."""

    case: Case
    answer: str

    def row(self) -> dict[str, Any]:
        """Return what a file of transcripts says of it."""
        return {**self.case.row(), "cited": self.cited, "answer": self.answer}

    @property
    def cited(self) -> list[int]:
        return find(self.answer, self.case.shown)

    @property
    def cites_right(self) -> bool:
        """Say whether the first citation names a right passage."""
        return bool(self.cited) and self.cited[0] in self.case.right

    @property
    def has_key_phrase(self) -> bool:
        return contains(self.answer, self.case.asked.key_phrase)

    @property
    def refuses(self) -> bool:
        return refuses(self.answer)


@dataclass(slots=True)
class Report:
    """Results of the questions that have an answer and of those that have none."""

    answered: list[Result] = field(default_factory=list)
    unanswerable: list[Result] = field(default_factory=list)

    def summary(self) -> dict[str, float | int]:
        """Return the figures; citations count against all questions, found or not."""
        results = self.answered
        return {
            "n": len(results),
            "citation_accuracy": _share([r.cites_right for r in results]),
            "first_passage_baseline": _share([1 in r.case.right for r in results]),
            "key_phrase": _share([r.has_key_phrase for r in results]),
            "refusal": _share([r.refuses for r in self.unanswerable]),
            "false_refusal": _share([r.refuses for r in results]),
        }

    def by_set(self) -> dict[str, dict[str, float | int]]:
        """Return figures of each set, and how often a right passage was shown at all."""
        figures: dict[str, dict[str, float | int]] = {}
        for name in dict.fromkeys(r.case.asked.set for r in self.answered):
            part = Report([r for r in self.answered if r.case.asked.set == name])
            row = part.summary()
            row["shown"] = _share([bool(r.case.right) for r in part.answered])
            row.pop("refusal")
            figures[name] = row
        for name in dict.fromkeys(r.case.asked.set for r in self.unanswerable):
            rows = [r for r in self.unanswerable if r.case.asked.set == name]
            figures[f"unanswerable {name}"] = {
                "n": len(rows),
                "refusal": _share([r.refuses for r in rows]),
            }
        return figures


def refuses(answer: str) -> bool:
    """Say whether an answer says that the documents do not answer; one that cites does not."""
    return bool(_REFUSALS.search(answer)) and not find(answer, 10_000)


def read_asked(questions: Sequence[Question], file: Path, unanswerable: Path) -> list[Asked]:
    """Return the questions of a file with their key phrases, then those without an answer.

    Raises:
        EvaluationError: a row has no key phrase, or the second file cannot be read.
    """
    asked = []
    rows = file.read_text(encoding="utf-8-sig").split("\n")
    for question in questions:
        phrase = json.loads(rows[question.line - 1]).get("key_phrase")
        if not isinstance(phrase, str) or not phrase.strip():
            raise EvaluationError(f'Line {question.line} of {file} has no text in "key_phrase".')
        asked.append(Asked(question.text, question.answers, phrase, question.set or ""))
    try:
        lines = unanswerable.read_text(encoding="utf-8-sig").splitlines()
        rows_without = [json.loads(line) for line in lines if line.strip()]
        asked += [Asked(row["question"], (), "", str(row.get("set", ""))) for row in rows_without]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{unanswerable} cannot be read as rows with a question: {error}."
        ) from error
    return asked


def make_cases(
    asked: Sequence[Asked],
    documents: dict[str, Document],
    embedder: Embedder,
    scratch: Path,
    *,
    course: dict[Language, str],
    count: CountTokens,
    context_tokens: int,
    passages: int,
    seed: int | None = 0,
    glossary: Glossary | None = None,
    on_embed: Progress | None = None,
) -> list[Case]:
    """Index the documents, search for each question, and put its prompt together.

    Passages are shuffled by `seed`; None leaves them best first.
    """
    glossary = glossary or Glossary.load()
    indexed = Indexed.build(documents, embedder, scratch, glossary, on_embed)
    index, paths, texts = indexed.index, indexed.paths, indexed.texts
    cases = []
    for number, question in enumerate(asked):
        found = [hit.passage_id for hit in index.search(question.text, passages)]
        if seed is not None:
            Random(f"{seed}-{number}").shuffle(found)
        shown = [
            PromptPassage(d.text, title, tuple(d.heading_path), d.page)
            for d, title in (indexed.drafts[place] for place in found)
        ]
        language: Language = "zh" if has_cjk(question.text) else "en"
        prompt = build_prompt(
            course=course[language],
            question=question.text,
            passages=shown,
            history=[],
            count_tokens=count,
            context_tokens=context_tokens,
            answer_reserve=ANSWER_TOKENS,
            language=language,
            terms=glossary.names(question.text, (p.text for p in shown)),
        )
        used = [found[place] for place in prompt.used_passages]
        right = tuple(
            n
            for n, place in enumerate(used, start=1)
            if any(paths[place] == p and contains(texts[place], a) for p, a in question.answers)
        )
        cases.append(Case(question, prompt.messages, right, len(used)))
    return cases


def measure(
    cases: Sequence[Case],
    model: Model,
    on_answer: Callable[[int, int], None] | None = None,
) -> Report:
    """Have every case answered, greedily, one after the other."""
    report = Report()
    for number, case in enumerate(cases, start=1):
        result = Result(case, model.answer(case.messages, ANSWER_TOKENS))
        (report.answered if case.asked.answers else report.unanswerable).append(result)
        if on_answer is not None:
            on_answer(number, len(cases))
    return report


def estimate_messages(messages: list[Message]) -> int:
    """Return about the length of a chat in tokens, where no tokenizer is at hand."""
    return sum(estimate_tokens(m["content"]) + 8 for m in messages)


def _share(found: Sequence[bool]) -> float:
    return round(sum(found) / len(found), 4) if found else 0.0
