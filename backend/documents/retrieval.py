"""The seam to rag: everything the platform asks of it, in the words of the platform."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class IndexPassage:
    """A stored passage on its way into an index."""

    id: int
    title: str
    text: str
    heading_path: tuple[str, ...]
    page: int | None
    start: int
    end: int


@dataclass(frozen=True)
class Hit:
    passage_id: int
    score: float


class IndexUnusable(Exception):
    """An index cannot be opened; str() is a sentence for a person."""


class OpenIndex(Protocol):
    def search(self, query: str, k: int) -> list[Hit]: ...


class Retrieval(Protocol):
    def warm_up(self) -> None:
        """Load what the first call would otherwise wait for."""

    def build(self, folder: Path, passages: Sequence[IndexPassage], progress: Progress) -> None:
        """Build the next generation in `folder` and swap it in atomically."""

    def open(self, folder: Path) -> OpenIndex:
        """Open the newest generation; raises IndexUnusable."""
