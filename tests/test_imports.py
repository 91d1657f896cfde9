"""Who may import whom: the house's import rule, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {"backend", "serving", "rag", "web", "monitoring", "deploy"}
ALLOWED = {
    "backend": {"rag", "monitoring"},
    "serving": {"monitoring"},
    "rag": set(),
    "monitoring": set(),
    "web": set(),
    "deploy": set(),  # cli.py loads parts by name when their subcommand is called
}


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found & PARTS


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    sources = [
        path
        for path in (ROOT / part).rglob("*.py")
        if "sample_course" not in path.parts  # handouts of the sample course, not code of ours
    ]
    assert sources
    for path in sources:
        beyond = imported_parts(path) - ALLOWED[part] - {part}
        assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}"


def test_nothing_uses_pickle() -> None:
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {
                alias.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import)
                for alias in node.names
            } | {
                (node.module or "").split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
            }
            assert not names & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
