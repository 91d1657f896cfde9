"""Chinese and English names of the same thing, used in both legs of retrieval.

`zh_en.tsv` has one row for each notion: Chinese variants separated by `|`, a tab, English variants
separated by `|`, the usual one first. A course adds rows of its own in a file of the same form.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rag.tokens import chinese_words, cjk_share, is_dictionary_word

_CJK_RUN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+")
#: Names given with one question; and the share of Chinese letters of a Chinese passage.
_MOST_NAMES = 12
_CHINESE_PASSAGE = 0.3
_FILE = Path(__file__).with_name("zh_en.tsv")


class GlossaryError(ValueError):
    """A glossary file that cannot be read; the message names the line."""


@dataclass(frozen=True, slots=True)
class Term:
    """A glossary term found in a text: `text[start:end]`, and its English variants."""

    start: int
    end: int
    english: tuple[str, ...]


class Glossary:
    """Finds Chinese terms in texts and gives their English names."""

    def __init__(self, rows: Mapping[str, Sequence[str]]) -> None:
        self._rows = {chinese: tuple(english) for chinese, english in rows.items()}
        self._longest = max((len(chinese) for chinese in self._rows), default=0)
        digest = hashlib.sha256()
        for chinese in sorted(self._rows):
            digest.update(f"{chinese}\t{'|'.join(self._rows[chinese])}\n".encode())
        self.sha256 = digest.hexdigest()

    @classmethod
    def load(cls, extra: Path | None = None) -> Glossary:
        """Return the general glossary, with the rows of a course's file before its own.

        Raises:
            GlossaryError: a row without a tab or without a name on one side.
        """
        rows = dict(_general())
        if extra is not None:
            for chinese, english in read_rows(extra).items():
                rows[chinese] = tuple(dict.fromkeys((*english, *rows.get(chinese, ()))))
        return cls(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, chinese: object) -> bool:
        return chinese in self._rows

    def english(self, chinese: str) -> tuple[str, ...]:
        """Return the English variants of one Chinese term, or nothing."""
        return self._rows.get(chinese, ())

    def find(self, text: str) -> list[Term]:
        """Return the terms in `text` so that as few characters as possible stay unnamed.

        Among equal covers the one with fewer, longer terms wins. A term of one character counts
        only where the word cutter sees it as a word, for such characters occur in many words.
        """
        found: list[Term] = []
        for run in _CJK_RUN.finditer(text):
            found.extend(self._find_in_run(run.group(), run.start()))
        return found

    def translate(self, text: str) -> str:
        """Return the English of `text`: terms by usual names, ASCII kept, the rest dropped."""
        parts: list[str] = []
        position = 0
        for term in self.find(text):
            parts.append(_CJK_RUN.sub(" ", text[position : term.start]))
            parts.append(f" {term.english[0]} ")
            position = term.end
        parts.append(_CJK_RUN.sub(" ", text[position:]))
        return " ".join("".join(parts).replace("，", ", ").replace("。", ". ").split())

    def names(self, question: str, passages: Iterable[str]) -> list[tuple[str, str]]:
        """Return (term, usual English name) for the terms of a question over English passages.

        Nothing where every passage is Chinese: then the question's own words are there to be found.
        """
        if all(cjk_share(text) > _CHINESE_PASSAGE for text in passages):
            return []  # true of no passages at all, too
        found: dict[str, str] = {}
        for term in self.find(question):
            if term.end - term.start > 1:
                found.setdefault(question[term.start : term.end], term.english[0])
        return list(found.items())[:_MOST_NAMES]

    def coverage(self, text: str) -> float:
        """Return the share of the Chinese characters of `text` that terms name."""
        total = sum(len(run) for run in _CJK_RUN.findall(text))
        return sum(t.end - t.start for t in self.find(text)) / total if total else 0.0

    def _find_in_run(self, run: str, offset: int) -> list[Term]:
        single = _single_words(run)
        length = len(run)
        # costs[i]: (unnamed characters, terms) of the best cover of run[i:]; steps[i]: its start
        costs: list[tuple[int, int]] = [(0, 0)] * (length + 1)
        steps = [1] * length
        for i in range(length - 1, -1, -1):
            best, step = (costs[i + 1][0] + 1, costs[i + 1][1]), 0
            for size in range(1, min(self._longest, length - i) + 1):
                if run[i : i + size] not in self._rows or (size == 1 and i not in single):
                    continue
                cost = (costs[i + size][0], costs[i + size][1] + 1)
                if cost < best or (cost == best and size > step):
                    best, step = cost, size
            costs[i], steps[i] = best, step
        terms: list[Term] = []
        i = 0
        while i < length:
            size = steps[i]
            if size:
                terms.append(Term(offset + i, offset + i + size, self._rows[run[i : i + size]]))
            i += size or 1
        return terms


def _single_words(run: str) -> set[int]:
    """Return the positions at which a character may be a word of its own."""
    positions: set[int] = set()
    position = 0
    for word in chinese_words(run):
        # A word that no dictionary has is the cutter's guess ("栈里"), so its characters may stand
        # alone as well.
        if len(word) == 1 or not is_dictionary_word(word):
            positions.update(range(position, position + len(word)))
        position += len(word)
    return positions


def read_rows(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the rows of a glossary file, one for each Chinese variant."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GlossaryError(
            f"The glossary {path} cannot be read as UTF-8 text: {error}."
        ) from error
    rows: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        left, tab, right = line.partition("\t")
        chinese = [part.strip() for part in left.split("|") if part.strip()]
        english = [part.strip() for part in right.split("|") if part.strip()]
        if not tab or not chinese or not english:
            raise GlossaryError(
                f"Line {number} of the glossary {path} is not `Chinese|names<tab>English|names`."
            )
        for name in chinese:
            rows[name] = tuple(dict.fromkeys((*rows.get(name, ()), *english)))
    return rows


@lru_cache(maxsize=1)
def _general() -> dict[str, tuple[str, ...]]:
    return read_rows(_FILE)
