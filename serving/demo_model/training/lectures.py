"""Own lecture notes with questions as a student would ask them.

    python -m serving.demo_model.training.lectures FILE [--show]

checks a file of `lecture_notes/` and prints what is wrong with it; `--show` prints every sentence
with its questions. A file is made of documents, sections and questions:

    ## Title of a document
    # Heading of a section
    A paragraph in one line, at least three sentences.
    - A point of a list is a line of its own.
        code behind four spaces, at most one block
    ?2 A question that the section's second sentence answers.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from serving.demo_model.training.corpus import Passage, content, make_passage

NOTES = Path(__file__).with_name("lecture_notes")
_ASKED = re.compile(r"\?(\d+) +(\S.*)")
_POINT = re.compile(r"(?:-|\d+[.)]) ")
#: Words of a question that its sentence has too, at most: else nothing is put otherwise.
_COPIED = 0.8
_SHORTEST, _LONGEST = 60, 1400


@dataclass(frozen=True, slots=True)
class Lecture:
    """A section as a passage, and questions: (number of the sentence from 0, question)."""

    passage: Passage
    asked: tuple[tuple[int, str], ...]


@cache
def lectures() -> tuple[Lecture, ...]:
    """Read the sections of all files in `lecture_notes/`."""
    return tuple(made for file in sorted(NOTES.glob("*.txt")) for made in read(file))


def read(file: Path) -> list[Lecture]:
    """Read the sections of a file.

    Raises:
        ValueError: a line stands where it has no meaning, or a question names no sentence.
    """
    made: list[Lecture] = []
    title = heading = ""
    paragraphs: list[str] = []
    code: list[str] = []
    asked: list[tuple[int, str]] = []

    def put() -> None:
        nonlocal heading
        if heading:
            group = f"{file.stem}/{title}"
            passage = make_passage(group, title, heading, paragraphs, "\n".join(code))
            if missing := [n for n, _ in asked if not 0 <= n < len(passage.spans)]:
                raise ValueError(
                    f"{file.name}: “{heading}” has {len(passage.spans)} sentences,"
                    f" a question names number {missing[0] + 1}"
                )
            made.append(Lecture(passage, tuple(asked)))
        heading = ""
        paragraphs.clear()
        code.clear()
        asked.clear()

    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if line.startswith("## "):
            put()
            title = line[3:].strip()
        elif line.startswith("# "):
            put()
            heading = line[2:].strip()
        elif found := _ASKED.fullmatch(line.rstrip()):
            asked.append((int(found[1]) - 1, found[2]))
        elif (line.strip() and not (title and heading)) or line.startswith("?"):
            raise ValueError(f"{file.name}:{number}: what is this line? {line[:60]}")
        elif line.startswith("    "):
            code.append(line[4:])
        elif line.strip() and asked:
            raise ValueError(f"{file.name}:{number}: text after questions; is a heading missing?")
        elif _POINT.match(line) and paragraphs and _POINT.match(paragraphs[-1]):
            paragraphs[-1] += "\n" + line.rstrip()
        elif line.strip():
            paragraphs.append(line.rstrip())
    put()
    return made


def faults(sections: list[Lecture]) -> list[str]:
    """Return what is wrong with sections, a line each."""
    found: list[str] = []
    seen: set[str] = set()
    for section in sections:
        passage = section.passage
        name = f"{passage.title} › {passage.heading}"
        if not _SHORTEST <= len(passage.body) <= _LONGEST:
            found.append(f"{name}: {len(passage.body)} characters, not {_SHORTEST} to {_LONGEST}")
        if len(passage.spans) < 2:
            found.append(f"{name}: only one sentence")
        if len(section.asked) < 2:
            found.append(f"{name}: fewer than two questions")
        for number, question in section.asked:
            told = passage.sentence(number)
            words = content(question)
            shared = len(words & content(told)) / max(len(words), 1)
            if len(words) > 3 and shared > _COPIED:
                found.append(f"{name}: {shared:.0%} of the words are the text's: {question}")
            if question in seen:
                found.append(f"{name}: asked twice: {question}")
            seen.add(question)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--show", action="store_true", help="print sentences with questions")
    chosen = parser.parse_args()
    wrong = 0
    for file in chosen.files:
        try:
            sections = read(file)
        except ValueError as error:
            sys.exit(str(error))
        if chosen.show:
            for section in sections:
                print(f"# {section.passage.title} › {section.passage.heading}")
                for place in range(len(section.passage.spans)):
                    print(f"{place + 1}. {section.passage.sentence(place)}")
                    print("".join(f"   ? {q}\n" for n, q in section.asked if n == place), end="")
        told = faults(sections)
        wrong += len(told)
        for line in told:
            print(line)
        questions = [q for s in sections for _, q in s.asked]
        print(f"{file.name}: {len(sections)} sections, {len(questions)} questions, "
              f"{len(told)} faults")  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
