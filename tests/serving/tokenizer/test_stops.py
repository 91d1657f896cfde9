"""Stop strings: where a text is cut never depends on how it arrives."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serving.tokenizer.stops import StopFinder

LETTERS = st.text(alphabet="ab中\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab中\n", min_size=1, max_size=4), min_size=1, max_size=4)


def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By the definition: the first position at which some stop string ends, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            best = max(ending, key=len)
            return text[: end - len(best)], best
    return text, None


@given(LETTERS, STOPS, st.lists(st.integers(0, 24), max_size=8))
def test_any_cutting_gives_the_definition(text: str, stop: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stop)
    shown = ""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for low, high in itertools.pairwise(borders):
        if finder.matched is None:
            shown += finder.push(text[low:high])
            # Nothing shown so far may be taken back by a later match.
            assert expected(text, stop)[0].startswith(shown)
    if finder.matched is None:
        shown += finder.held
    assert (shown, finder.matched) == expected(text, stop)


@given(LETTERS, STOPS)
def test_only_what_could_begin_a_stop_is_held(text: str, stop: list[str]) -> None:
    finder = StopFinder(stop)
    finder.push(text)
    if finder.matched is None and finder.held:
        assert any(s.startswith(finder.held) and s != finder.held for s in stop)


def test_text_before_min_tokens_does_not_stop() -> None:
    finder = StopFinder(["ab"])
    assert finder.push("xab", may_stop=False) == "xab"
    assert finder.push("ab") == ""
    assert finder.matched == "ab"
