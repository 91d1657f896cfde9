"""The course index: building, swapping, searching, refusing."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rag.embedding import HashingEmbedder, Progress, Vectors
from rag.glossary import Glossary
from rag.index import (
    CourseIndex,
    EmbedderMismatch,
    IndexCorrupt,
    IndexMissing,
    IndexReader,
    build,
    current_generation,
)
from rag.index.course import fuse
from rag.index.forms import dense_document, query_forms, readable, sparse_document
from rag.index.sparse import SparseIndex
from rag.passages import PassageDraft

TEXTS = {
    10: "Registers run out and values are spilled to the stack.",
    20: "A parser reads tokens and builds a syntax tree.",
    30: "Garbage collection frees memory that nothing points to.",
    40: "寄存器分配用图着色，放不下的变量溢出到内存。",
    50: "移进归约冲突可以用优先级解决。",
}


class CountingEmbedder(HashingEmbedder):
    """Counts how many passages it was really asked to embed."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__(dim)
        self.embedded = 0

    def embed_documents(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        self.embedded += len(texts)
        return super().embed_documents(texts, progress)


class EnglishOnly(HashingEmbedder):
    @property
    def english_only(self) -> bool:
        return True


def passages(texts: dict[int, str] | None = None) -> list[tuple[int, PassageDraft, str]]:
    chosen = TEXTS if texts is None else texts
    return [(n, PassageDraft(t, ("Part",), None, 0, len(t)), "Notes") for n, t in chosen.items()]


def ids(index: CourseIndex, query: str, **options: object) -> list[int]:
    return [hit.passage_id for hit in index.search(query, **options)]  # type: ignore[arg-type]


def test_search_finds_by_both_legs(tmp_path: Path) -> None:
    manifest = build(tmp_path, passages(), HashingEmbedder())
    index = CourseIndex.open(tmp_path, HashingEmbedder())
    assert (manifest.count, manifest.generation, manifest.dim) == (5, 1, 256)
    best = index.search("spilled registers", 1)[0]
    assert best.passage_id == 10
    assert best.dense_rank == 1
    assert best.sparse_rank == 1
    assert best.score == pytest.approx(2 / 61)
    assert ids(index, "怎么解决移进归约冲突")[0] == 50
    assert len(index.search("registers", 2)) == 2


def test_a_chinese_question_finds_english_passages(tmp_path: Path) -> None:
    english = {n: t for n, t in TEXTS.items() if t.isascii()}
    build(tmp_path, passages(english), EnglishOnly())
    index = CourseIndex.open(tmp_path, EnglishOnly())
    hit = index.search("垃圾回收什么时候释放内存", 1)[0]
    assert hit.passage_id == 30
    assert hit.sparse_rank == 1
    assert hit.dense_rank == 1


def test_an_english_question_finds_chinese_passages(tmp_path: Path) -> None:
    chinese = {n: t for n, t in TEXTS.items() if not t.isascii()}
    build(tmp_path, passages(chinese), EnglishOnly())
    assert ids(CourseIndex.open(tmp_path, EnglishOnly()), "shift-reduce conflict")[0] == 50


def test_with_one_leg_empty_the_other_decides(tmp_path: Path) -> None:
    build(tmp_path, passages(), EnglishOnly())
    index = CourseIndex.open(tmp_path, EnglishOnly())
    hits = index.search("魑魅魍魉")
    assert hits == []
    only_sparse = index.search("着色魑魅")
    assert only_sparse[0].passage_id == 40
    assert [hit.passage_id for hit in fuse([], [3, 1, 2])] == [3, 1, 2]
    assert [hit.passage_id for hit in fuse([3, 1, 2], [])] == [3, 1, 2]


def test_fusion_adds_reciprocal_ranks() -> None:
    hits = {hit.passage_id: hit for hit in fuse([1, 2], [2, 3])}
    assert hits[2].score == pytest.approx(1 / 62 + 1 / 61)
    assert (hits[1].dense_rank, hits[1].sparse_rank) == (1, None)
    assert [hit.passage_id for hit in fuse([1, 2], [2, 3])] == [2, 1, 3]


def test_removed_and_unknown_passages_are_not_found(tmp_path: Path) -> None:
    build(tmp_path, passages(), HashingEmbedder())
    index = CourseIndex.open(tmp_path, HashingEmbedder())
    query = "registers parser memory 寄存器"
    assert set(ids(index, query)) >= {10, 20, 30, 40}
    assert 10 not in ids(index, query, removed=[10])
    assert set(ids(index, query, live={20, 30})) <= {20, 30}
    assert set(ids(index, query, live={20, 30}, removed=[30])) == {20}
    assert ids(index, query, live=set()) == []
    assert ids(index, query, live=[999]) == []


def test_the_same_text_is_shown_once(tmp_path: Path) -> None:
    texts = {1: "A parser reads tokens.", 2: "A parser\nreads tokens.", 3: "A lexer makes tokens."}
    build(tmp_path, passages(texts), HashingEmbedder())
    index = CourseIndex.open(tmp_path, HashingEmbedder())
    found = ids(index, "parser tokens")
    assert len({1, 2} & set(found)) == 1
    assert 3 in found
    assert 2 in ids(index, "parser tokens", removed=[1])


def test_a_reranker_changes_the_order(tmp_path: Path) -> None:
    class ByLength:
        def score(self, query: str, texts: Sequence[str]) -> Sequence[float]:
            return [float(-len(text)) for text in texts]

    build(tmp_path, passages(), HashingEmbedder())
    index = CourseIndex.open(tmp_path, HashingEmbedder())
    plain = ids(index, "registers parser memory")
    ranked = ids(index, "registers parser memory", reranker=ByLength(), text_of=TEXTS.__getitem__)
    assert sorted(ranked) == sorted(plain)
    assert ranked == sorted(plain, key=lambda n: len(TEXTS[n]))


def test_only_new_texts_are_embedded(tmp_path: Path) -> None:
    embedder = CountingEmbedder()
    build(tmp_path, passages(), embedder)
    assert embedder.embedded == 5
    changed = {**TEXTS, 10: "Other text about linkers.", 60: TEXTS[20]}
    del changed[30]
    build(tmp_path, passages(changed), embedder)
    assert embedder.embedded == 6
    index = CourseIndex.open(tmp_path, embedder)
    assert index.manifest.count == 5
    assert ids(index, "linkers")[0] == 10
    assert 30 not in ids(index, "garbage collection memory")
    build(tmp_path, passages(changed), CountingEmbedder(64))
    assert CourseIndex.open(tmp_path, HashingEmbedder(64)).manifest.dim == 64


def test_an_empty_course(tmp_path: Path) -> None:
    build(tmp_path, [], HashingEmbedder())
    assert CourseIndex.open(tmp_path, HashingEmbedder()).search("anything") == []
    build(tmp_path, passages(), HashingEmbedder())
    assert ids(CourseIndex.open(tmp_path, HashingEmbedder()), "parser")[0] == 20


@pytest.mark.parametrize("query", ["", "   ", "？！", "the of and", "\x00"])
def test_questions_without_words_are_no_error(tmp_path: Path, query: str) -> None:
    build(tmp_path, passages(), HashingEmbedder())
    assert CourseIndex.open(tmp_path, HashingEmbedder()).search(query) == []


def test_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexMissing, match="upload a document"):
        CourseIndex.open(tmp_path / "none", HashingEmbedder())
    assert current_generation(tmp_path / "none") is None


def test_another_embedder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    build(tmp_path, passages(), HashingEmbedder())
    with pytest.raises(EmbedderMismatch, match="another dim"):
        CourseIndex.open(tmp_path, HashingEmbedder(64))

    class Other(HashingEmbedder):
        @property
        def identity(self) -> dict[str, str | int | bool]:
            return {"model": "other", "dim": 256}

    with pytest.raises(EmbedderMismatch, match="index the course again") as caught:
        CourseIndex.open(tmp_path, Other())
    assert "hashing" in str(caught.value)
    assert "LECTERN_EMBEDDER" in str(caught.value)


@pytest.mark.parametrize("name", ["vectors.faiss", "sparse.npz", "terms.txt", "keys.npz"])
def test_a_damaged_file_is_noticed_and_healed_by_a_build(tmp_path: Path, name: str) -> None:
    build(tmp_path, passages(), HashingEmbedder())
    file = tmp_path / "generation-000001" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(IndexCorrupt, match="index the course again"):
        CourseIndex.open(tmp_path, HashingEmbedder())
    embedder = CountingEmbedder()
    build(tmp_path, passages(), embedder)
    assert embedder.embedded == 5
    assert ids(CourseIndex.open(tmp_path, embedder), "parser")[0] == 20


def test_missing_files_and_strange_manifests(tmp_path: Path) -> None:
    build(tmp_path, passages(), HashingEmbedder())
    place = tmp_path / "generation-000001"
    manifest = json.loads((place / "manifest.json").read_text())
    for text in ("{", "[]", json.dumps({**manifest, "format": 99}), json.dumps({"format": 1})):
        (place / "manifest.json").write_text(text)
        with pytest.raises(IndexCorrupt, match="index the course again"):
            CourseIndex.open(tmp_path, HashingEmbedder())


def test_a_build_that_breaks_off_leaves_the_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, passages(), HashingEmbedder())

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rag.index.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, passages({1: "other"}), HashingEmbedder())
    monkeypatch.undo()
    assert current_generation(tmp_path) == "generation-000001"
    assert ids(CourseIndex.open(tmp_path, HashingEmbedder()), "parser")[0] == 20
    (tmp_path / "building-left").mkdir()
    build(tmp_path, passages({1: "other"}), HashingEmbedder())
    assert ids(CourseIndex.open(tmp_path, HashingEmbedder()), "other") == [1]
    assert not list(tmp_path.glob("building-*"))


def test_old_generations_go_and_readers_follow(tmp_path: Path) -> None:
    reader = IndexReader(tmp_path, HashingEmbedder())
    build(tmp_path, passages({1: "first text"}), HashingEmbedder())
    first = reader.get()
    assert first is reader.get()
    for number in range(2, 6):
        build(tmp_path, passages({number: f"text number {number}"}), HashingEmbedder())
    assert len(list(tmp_path.glob("generation-*"))) == 2
    assert not first.is_current
    assert ids(first, "first text") == [1]
    assert ids(reader.get(), "text number 5")[0] == 5


def test_readers_never_see_half_a_build(tmp_path: Path) -> None:
    build(tmp_path, passages({1: "round 0"}), HashingEmbedder())
    problems: list[str] = []
    done = threading.Event()

    def read() -> None:
        reader = IndexReader(tmp_path, HashingEmbedder())
        while not done.is_set():
            index = reader.get()
            if len(ids(index, "round", k=50)) != index.manifest.count:
                problems.append(index.generation)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(1, 15):
            texts = {n: f"round {turn} passage {n}" for n in range(turn)}
            build(tmp_path, passages(texts), HashingEmbedder())
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert problems == []


@pytest.mark.parametrize("numbers", [[1, 1], [-1]])
def test_passage_numbers_must_be_keys(tmp_path: Path, numbers: list[int]) -> None:
    bad = [(n, PassageDraft("x", (), None, 0, 1), "t") for n in numbers]
    with pytest.raises(ValueError, match="different numbers"):
        build(tmp_path, bad, HashingEmbedder())


def test_bm25_prefers_rare_words_and_short_passages() -> None:
    index = SparseIndex.build(
        [7, 8, 9],
        [{"stack": 1, "heap": 1}, {"stack": 1}, {"stack": 1, "a": 5, "b": 5}],
    )
    assert [place for place, _ in index.search({"stack": 1}, 3)] == [1, 0, 2]
    assert [place for place, _ in index.search({"stack": 1, "heap": 1}, 1)] == [0]
    assert index.search({"none": 1}, 3) == []
    allowed = np.array([True, False, True])
    assert [place for place, _ in index.search({"stack": 1}, 3, allowed)] == [0, 2]


def test_what_is_embedded_is_readable() -> None:
    text = "## Head\n\n```c\nint x;\n```\n\nSee [the **book**](http://x/y_(z)) `code`\n\n|a|\n|---|"
    shown = readable(text)
    for absent in ("```", "http", "**", "##", "---"):
        assert absent not in shown
    for kept in ("Head", "int x;", "See the book", "code"):
        assert kept in shown


def test_forms_of_a_chinese_question() -> None:
    glossary = Glossary.load()
    forms = query_forms("寄存器分配", glossary, english_only=True)
    assert forms.dense == "register allocation"
    assert forms.sparse["寄存器"] == 1
    assert forms.sparse["regist"] > 1
    assert query_forms("寄存器分配", glossary, english_only=False).dense == "寄存器分配"
    assert query_forms("魑魅", glossary, english_only=True).dense is None
    assert query_forms("what is SSA", glossary, english_only=True).dense == "what is SSA"


def test_forms_of_a_chinese_passage() -> None:
    glossary = Glossary.load()
    draft = PassageDraft("寄存器分配决定变量放在哪里。", ("后端",), None, 0, 14)
    assert dense_document(draft, "讲义", glossary, english_only=False).startswith("讲义 > 后端\n")
    assert "register allocation" in dense_document(draft, "讲义", glossary, english_only=True)
    bag = sparse_document(draft, "讲义", glossary)
    assert bag["寄存器"] == 1
    assert 0 < bag["regist"] < 1
