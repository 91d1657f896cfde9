"""`lectern eval retrieval` on small folders, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from rag.cli import register
from rag.evaluation import Tally, contains
from rag.sample import sample_course_folder, sample_documents_folder, sample_questions_file


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    words = ["eval", "retrieval", "--embedder", "hashing", *map(str, arguments)]
    return CliRunner().invoke(app, words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "a.md").write_text(
        "# Stacks\n\nA stack gives back\nthe last thing first.\n\n# Queues\n\nA queue is fair.\n"
    )
    (tmp_path / "docs" / "sub" / "b.txt").write_text("堆是一棵完全二叉树，\n根最小。\n")
    (tmp_path / "docs" / "broken.pdf").write_bytes(b"%PDF-rubbish")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "docs"


def write(tmp_path: Path, *rows: object) -> Path:
    file = tmp_path / "questions.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


GOOD = {"question": "last thing first stack", "path": "a.md", "anchor": "gives back the last"}


def test_figures_end_stdout_as_one_json_object(folder: Path, tmp_path: Path) -> None:
    rows = [
        {**GOOD, "set": "en-en"},
        {"question": "堆的根", "path": "sub/b.txt", "anchor": "二叉树，根最小", "set": "zh-zh"},
        {
            "question": "fair queue",
            "path": "a.md",
            "anchor": "not in there",
            "alt": [{"path": "a.md", "anchor": "A  queue is\nfair"}],
        },
    ]
    result = run("--documents", folder, "--questions", write(tmp_path, *rows))
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.strip().split("\n")[-1])
    assert set(last) == {"n", "recall@1", "recall@5", "recall@10", "mrr", "ms_per_query"}
    assert last["n"] == 3
    assert last["recall@1"] == last["mrr"] == 1.0
    assert last["ms_per_query"] > 0
    for word in ("hybrid", "bm25", "dense", "en-en", "zh-zh", "all"):
        assert word in result.stdout
    assert "questions/s" in result.stderr
    assert "s left" in result.stderr
    assert "broken.pdf is left out" in result.stderr


def test_json_output_is_lines_of_json(folder: Path, tmp_path: Path) -> None:
    result = run("--documents", folder, "--questions", write(tmp_path, GOOD), "--json")
    first, last = (json.loads(line) for line in result.stdout.strip().split("\n"))
    assert first["documents"] == 2
    assert first["details"]["bm25 all"]["recall@1"] == 1.0
    assert last["n"] == 1


def test_an_anchor_that_no_passage_has_is_a_miss(folder: Path, tmp_path: Path) -> None:
    row = {"question": "x stack", "path": "a.md", "anchor": "nowhere"}
    result = run("--documents", folder, "--questions", write(tmp_path, GOOD, row))
    assert result.exit_code == 0
    assert "line 2" in result.stderr
    assert json.loads(result.stdout.strip().split("\n")[-1])["recall@10"] == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "Line 2"),
        ('["list"]', "Line 2"),
        ({"path": "a.md", "anchor": "x"}, '"question"'),
        ({"question": "q", "anchor": "x"}, '"path"'),
        ({"question": "q", "path": "a.md", "anchor": "  "}, '"anchor"'),
        ({"question": "q", "path": "a.md", "anchor": 3}, '"anchor"'),
        ({**GOOD, "path": "none.md"}, "none.md"),
        ({**GOOD, "path": "../secret"}, "inside"),
        ({**GOOD, "alt": "a.md"}, '"alt"'),
        ({**GOOD, "alt": [{"path": "a.md"}]}, '"anchor"'),
        ({**GOOD, "set": 5}, '"set"'),
    ],
)
def test_a_wrong_row_is_named(folder: Path, tmp_path: Path, row: object, message: str) -> None:
    result = run("--documents", folder, "--questions", write(tmp_path, GOOD, row))
    assert result.exit_code == 2
    assert "Line 2" in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_places_are_named(folder: Path, tmp_path: Path) -> None:
    questions = write(tmp_path, GOOD)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in [
        (("--documents", tmp_path / "no", "--questions", questions), "There is no folder"),
        (("--documents", folder, "--questions", tmp_path / "no.jsonl"), "no questions file"),
        (("--documents", empty, "--questions", questions), "no document"),
        (("--documents", folder, "--questions", write(empty, "")), "holds no question"),
        (("--documents", folder), "Give both"),
        (("--documents", folder, "--questions", questions, "--glossary", folder), "glossary"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert result.stdout == ""


def test_an_unknown_embedder_is_named(folder: Path, tmp_path: Path) -> None:
    questions = write(tmp_path, GOOD)
    result = run("--documents", folder, "--questions", questions, "--embedder", "no/such")
    assert result.exit_code == 2
    assert "no/such" in result.stderr


def test_tally() -> None:
    figures = Tally([1, 2, None, 10]).figures()
    assert figures == {"n": 4, "recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "mrr": 0.4}


def test_white_space_in_anchors() -> None:
    assert contains("a  b\n c", "b c")
    assert not contains("ab", "a b")
    assert contains("编译\n器", "编译器")


def test_where_the_sample_course_lies() -> None:
    assert sample_documents_folder().parent == sample_course_folder()
    assert sample_questions_file().parent == sample_course_folder()
    assert sample_course_folder().parent.name == "rag"
