"""Finds the passage numbers that an answer cites."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t>]*(?P<mark>`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_NUMBERS = r"\s*\d{1,4}(?:\s*[,，、;；–—-]\s*\d{1,4})*\s*"
_CITATION = re.compile(rf"\[({_NUMBERS})\]|【({_NUMBERS})】|［({_NUMBERS})］")
_ITEM = re.compile(r"(\d+)(?:\s*[–—-]\s*(\d+))?")


def find(answer: str, n_passages: int) -> list[int]:
    """Return the cited passage numbers from 1 to `n_passages`, in order of first mention.

    Read are `[2]`, `【2】`, `[1, 2]`, `[1][2]` and `[1-3]`, not inside code. A fence that was
    never closed (an answer cut short) hides the rest of the answer.
    """
    found: dict[int, None] = {}
    for match in _CITATION.finditer(_without_code(answer)):
        numbers = next(group for group in match.groups() if group is not None)
        for item in _ITEM.finditer(numbers):
            first, last = int(item.group(1)), int(item.group(2) or item.group(1))
            for number in range(first, min(last, n_passages) + 1):
                if number >= 1:
                    found[number] = None
    return list(found)


def _without_code(answer: str) -> str:
    kept: list[str] = []
    position = 0
    mark = ""
    for line in _FENCE.finditer(answer):
        if not mark:
            mark = line.group("mark")
            kept.append(answer[position : line.start()])
        elif line.group("mark").startswith(mark) and not line.group().strip(" \t>`~"):
            mark = ""
            position = line.end()
    if not mark:
        kept.append(answer[position:])
    return _INLINE_CODE.sub(" ", "\n".join(kept))
