"""Reading a document in a child process with limits on memory and time."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from backend.documents.parse_child import EXIT_MEMORY

_CHILD = "backend.documents.parse_child"


class ParseError(Exception):
    """The document cannot be read; str() is a sentence for the teacher. Never retried."""


class ParseCrash(Exception):
    """The child ended in a way nobody foresaw; worth another attempt."""


@dataclass(frozen=True)
class ParsedPassage:
    text: str
    heading_path: list[str]
    page: int | None
    start: int
    end: int


@dataclass(frozen=True)
class ParsedDocument:
    title: str
    text: str
    passages: list[ParsedPassage]


class Parser(Protocol):
    def __call__(self, source: Path, name: str) -> ParsedDocument: ...


class ChildParser:
    """`seconds` and `memory` (bytes of address space) bound one document."""

    def __init__(self, seconds: float, memory: int, module: str = _CHILD) -> None:
        self._seconds = seconds
        self._memory = memory
        self._module = module

    def __call__(self, source: Path, name: str) -> ParsedDocument:
        with tempfile.TemporaryDirectory(prefix="lectern-parse-") as folder:
            out = Path(folder) / "out.json"
            command = [sys.executable, "-m", self._module, str(source), name, str(out)]
            command += [str(self._memory), str(os.getpid())]
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    timeout=self._seconds,
                    check=False,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            except subprocess.TimeoutExpired as error:
                raise ParseError(
                    f"Reading this document took longer than {self._seconds:.0f} seconds. Split it "
                    "into smaller files and upload those."
                ) from error
            if done.returncode == EXIT_MEMORY or b"MemoryError" in done.stderr:
                raise ParseError(
                    "Reading this document needs more memory than is allowed. Split it into "
                    "smaller files and upload those."
                )
            if done.returncode != 0 or not out.exists():
                last = done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1][:200]
                raise ParseCrash(f"the parser ended with code {done.returncode}: {last}")
            return _decode(msgspec.json.decode(out.read_bytes()))


def _decode(answer: dict[str, Any]) -> ParsedDocument:
    if "error" in answer:
        raise ParseError(answer["error"])
    passages = [ParsedPassage(**passage) for passage in answer["passages"]]
    return ParsedDocument(answer["title"], answer["text"], passages)
