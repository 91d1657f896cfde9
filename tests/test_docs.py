"""The documents stay true: every path and name in architecture.md exists, every command is real."""

import re
from pathlib import Path

import pytest

from deploy.cli import SUBCOMMANDS

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PARTS = ("backend", "serving", "rag", "web", "monitoring", "deploy", "tests", "docs")
#: What stands in code style in architecture.md without being a path or a name of the code.
NOT_OURS = {
    "web", "backend", "rag", "monitoring", "serving", "/v1", "/health", "/metrics",
    "documents/", "index/", "initial-login", "~/.lectern", "LECTERN_HOME", "LECTERN_NATIVE=0",
    "[pages, 2, page_size, kv_heads, head_dim]", "code",
}  # fmt: skip


def spans() -> list[str]:
    prose = re.sub(r"```.*?```", "", ARCHITECTURE, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def test_every_path_in_architecture_exists() -> None:
    paths = [s for s in spans() if s.split("/")[0] in PARTS and "/" in s]
    assert len(paths) > 60
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_name_in_architecture_is_defined() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for part in PARTS[:6]
        for path in (ROOT / part).rglob("*.py")
        if "sample_course" not in path.parts
    )
    names = [
        s for s in spans() if s not in NOT_OURS and "/" not in s and not s.startswith("lectern")
    ]
    assert {"Scheduler.choose", "PagePool.release", "find"} <= set(names)
    for name in names:
        for part in name.split("."):
            assert re.search(rf"^\s*(?:async def|def|class) {re.escape(part)}\b", sources, re.M), (
                name
            )


def test_every_command_in_the_documents_is_real() -> None:
    for name in ("README.md", "README.zh-CN.md", "docs/architecture.md", "docs/performance.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for command in re.findall(r"(?:bin/|`)lectern ([a-z]+)", text):
            assert command in SUBCOMMANDS, f"{name}: lectern {command}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_of_the_readme_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
