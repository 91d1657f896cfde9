"""Which passages an answer cites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag import citations


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Shift first [2], then reduce [1].", [2, 1]),
        ("先移进【2】，再归约［1］。", [2, 1]),
        ("Both [1][3] and [1, 2].", [1, 3, 2]),
        ("中文逗号 [1，2] 和 [3、1]", [1, 2, 3]),
        ("A range [1-3].", [1, 2, 3]),
        ("Not there [9] nor [0].", []),
        ("None at all.", []),
        ("```c\nint a[2];\n```\nSee [1].", [1]),
        ("~~~\na[2]\n```\n[3]\n~~~\n[1]", [1]),
        ("````\n```\n[2]\n```\n````\n[1]", [1]),
        ("The element `a[2]` is read [1].", [1]),
        ("Cut short:\n```python\nx[1] = 2", []),
        ("> ```\n> a[2]\n> ```\n[1]", [1]),
        ("[1-9999]", [1, 2, 3]),
        ("twice [1] and again [1]", [1]),
    ],
)
def test_find(answer: str, expected: list[int]) -> None:
    assert citations.find(answer, 3) == expected


def test_without_passages_nothing_is_cited() -> None:
    assert citations.find("[1][2]", 0) == []


@given(st.text(alphabet="[]【】123,- `~\nab", max_size=200), st.integers(0, 5))
def test_only_existing_numbers_and_each_once(answer: str, count: int) -> None:
    found = citations.find(answer, count)
    assert len(found) == len(set(found))
    assert all(1 <= number <= count for number in found)
