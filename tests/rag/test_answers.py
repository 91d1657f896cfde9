"""`lectern eval answers`: figures of good, lazy and silent models over the same cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag.answers import Asked, Case, Model, Report, Result, make_cases, measure, read_asked, refuses
from rag.documents import Document, parse
from rag.embedding import load_embedder
from rag.evaluation import EvaluationError, read_questions
from rag.prompt import Message
from rag.sample import sample_questions_file, sample_unanswerable_file

TEXTS = {
    "stack.md": "# Stacks\n\nA stack gives back the last thing first.\n",
    "queue.md": "# Queues\n\nA queue is fair: whoever waited longest is served first.\n",
    "heap.md": "# 堆\n\n堆是一棵完全二叉树，根结点最小。\n",
    "tree.md": "# Trees\n\nA balanced tree keeps its height low by turning subtrees around.\n",
}
ASKED = [
    Asked("Which structure returns the last thing first?",
          (("stack.md", "last thing first"),), "the last thing first", "en-en"),
    Asked("谁先得到服务？排队公平吗？ queue", (("queue.md", "is fair"),), "is fair", "zh-en"),
    Asked("堆的根结点怎么样？", (("heap.md", "根结点最小"),), "根结点最小", "zh-zh"),
    Asked("What is a zebra?", (), "", "en"),
]  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {name: parse(text.encode(), name) for name, text in TEXTS.items()}


def cases_of(documents: dict[str, Document], scratch: Path, seed: int | None = 0) -> list[Case]:
    return make_cases(
        ASKED, documents, load_embedder("hashing"), scratch,
        course={"zh": "数据结构", "en": "Structures"}, count=lambda messages: 100,
        context_tokens=4096, passages=4, seed=seed,
    )  # fmt: skip


class Scripted:
    """Says what a function of the case says; checks how it is asked."""

    context_tokens = 4096

    def __init__(self, cases: list[Case], kind: str) -> None:
        self._cases = {json.dumps(case.messages): case for case in cases}
        self._kind = kind

    def count(self, messages: list[Message]) -> int:
        return 100

    def answer(self, messages: list[Message], max_tokens: int) -> str:
        assert max_tokens > 0
        case = self._cases[json.dumps(messages)]
        if self._kind == "silent" or (self._kind == "good" and not case.right):
            return "The course passages do not answer this question."
        if self._kind == "first":
            return "Something. [1]"
        return f"According to [{case.right[0]}]: {case.asked.key_phrase}"


def test_a_good_model_gets_full_marks(documents: dict[str, Document], tmp_path: Path) -> None:
    cases = cases_of(documents, tmp_path)
    assert all(case.right for case in cases if case.asked.answers)
    model: Model = Scripted(cases, "good")
    report = measure(cases, model)
    figures = report.summary()
    assert list(figures) == [
        "n", "citation_accuracy", "first_passage_baseline", "key_phrase", "refusal",
        "false_refusal",
    ]  # fmt: skip
    assert figures["n"] == 3
    assert figures["citation_accuracy"] == figures["key_phrase"] == figures["refusal"] == 1.0
    assert figures["false_refusal"] == 0.0
    assert report.by_set()["zh-en"]["shown"] == 1.0
    assert report.by_set()["unanswerable en"] == {"n": 1, "refusal": 1.0}


def test_citing_the_first_passage_gives_the_baseline(
    documents: dict[str, Document], tmp_path: Path
) -> None:
    cases = cases_of(documents, tmp_path)
    figures = measure(cases, Scripted(cases, "first")).summary()
    assert figures["citation_accuracy"] == figures["first_passage_baseline"]
    assert figures["key_phrase"] == figures["refusal"] == 0.0


def test_a_silent_model_refuses_everything(documents: dict[str, Document], tmp_path: Path) -> None:
    cases = cases_of(documents, tmp_path)
    figures = measure(cases, Scripted(cases, "silent")).summary()
    assert figures["refusal"] == figures["false_refusal"] == 1.0
    assert figures["citation_accuracy"] == 0.0


def test_order_is_shuffled_by_the_seed_alone(
    documents: dict[str, Document], tmp_path: Path
) -> None:
    def orders(name: str, seed: int | None) -> list[tuple[int, ...]]:
        return [case.right for case in cases_of(documents, tmp_path / name, seed)]

    assert orders("a", 0) == orders("b", 0)
    assert orders("c", None)[0] == (1,)
    assert len({tuple(orders(f"s{seed}", seed)) for seed in range(4)}) > 1


def test_only_the_first_citation_counts() -> None:
    case = Case(ASKED[0], [], (2,), 4)
    assert Result(case, "It is so [2], and [1].").cites_right
    assert not Result(case, "It is so [1][2].").cites_right
    assert not Result(case, "It is so.").cites_right
    assert not Result(case, "See `[2]`.").cites_right


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The course passages do not answer this question.", True),
        ("课程资料中没有这个问题的答案。", True),
        ("资料中未提及此内容。", True),
        ("I could not find this in the material.", True),
        ("A stack does not contain holes [1].", False),
        ("According to [2]: the table does not mention it.", False),
        ("A stack gives back the last thing first.", False),
        ("", False),
    ],
)
def test_refusals(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected


def test_terms_are_named_over_english_passages_only(
    documents: dict[str, Document], tmp_path: Path
) -> None:
    over_english = {"stack.md": documents["stack.md"], "queue.md": documents["queue.md"]}
    asked = [Asked("栈和队列有什么区别？", (("stack.md", "stack"),), "x", "zh-en")]

    def last(folder: str, chosen: dict[str, Document]) -> str:
        found = make_cases(
            asked, chosen, load_embedder("hashing"), tmp_path / folder,
            course={"zh": "数据结构", "en": "Structures"}, count=lambda messages: 100,
            context_tokens=4096, passages=4,
        )  # fmt: skip
        return found[0].messages[-1]["content"]

    assert "术语：" in last("en", over_english)
    assert "队列 = queue" in last("en", over_english)
    assert "术语：" not in last("zh", {"heap.md": documents["heap.md"]})


def test_sample_questions_have_key_phrases_and_twenty_have_no_answer() -> None:
    file = sample_questions_file()
    asked = read_asked(read_questions(file), file, sample_unanswerable_file())
    assert sum(bool(a.answers) for a in asked) == 60
    assert sum(not a.answers for a in asked) == 20
    assert all(a.key_phrase for a in asked if a.answers)


def test_rows_without_a_key_phrase_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "path": "b.md", "anchor": "c"}\n')
    with pytest.raises(EvaluationError, match=r"Line 1 of .*\"key_phrase\""):
        read_asked(read_questions(file), file, sample_unanswerable_file())


def test_empty_reports_have_figures() -> None:
    assert Report().summary()["n"] == 0
