"""What may be done to a recorded load, and what a cache of prefixes leaves of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigError
from serving.traces import Recorded, Trace, read_trace
from serving.traces.prompts import prompt_tokens, uncached_tokens
from serving.traces.recorded import Mix

FOLDER = Path(__file__).parents[2] / "data" / "traces"
MOONCAKE = FOLDER / "mooncake_conversation_500.jsonl"


def plain(*times: float) -> Trace:
    return Trace("plain", [Recorded(at, 10 * place + 10, 5) for place, at in enumerate(times)],
                 shares=False)  # fmt: skip


def test_times_are_scaled() -> None:
    trace = plain(0.0, 1.0, 4.0)
    assert trace.rate == 0.5
    assert [one.at for one in trace.stretched(2).requests] == [0.0, 2.0, 8.0]
    faster = trace.at_rate(5.0)
    assert faster.rate == pytest.approx(5.0)
    assert [one.at for one in faster.requests] == pytest.approx([0.0, 0.1, 0.4])
    assert [one.tokens_in for one in faster.requests] == [10, 20, 30]
    for still in (plain(0.0), plain(0.0, 0.0)):
        assert still.rate == 0.0
        with pytest.raises(ConfigError, match="no duration"):
            still.at_rate(1.0)


def test_longer_requests_are_left_out() -> None:
    trace = plain(0.0, 1.0, 4.0)
    assert [one.tokens_in for one in trace.fitting(25).requests] == [10, 20]
    assert trace.fitting(14).requests == []
    big = Trace("big", [Recorded(0, 99, 1), Recorded(3, 9, 1)], shares=False)
    assert [one.at for one in big.fitting(50).requests] == [0.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 5))
def test_a_mix_keeps_all_but_the_prompts_it_draws(count: int, share: float, seed: int) -> None:
    trace = Trace("t", [Recorded(at, 7, at + 1, blocks=(at,)) for at in range(count)], shares=True)
    mixed = Mix(share, 8192).into(trace, seed)
    long = [one for one in mixed.requests if one.tokens_in == 8192]
    assert len(long) == round(share * count)
    assert all(one.blocks == () for one in long)
    assert [(one.at, one.tokens_out) for one in mixed.requests] == [
        (one.at, one.tokens_out) for one in trace.requests
    ]
    short = [one for one in mixed.requests if one.tokens_in != 8192]
    assert all(one in trace.requests for one in short)
    assert mixed == Mix(share, 8192).into(trace, seed)


def test_a_mix_is_drawn_by_the_seed() -> None:
    trace = Trace("t", [Recorded(at, 7, 3) for at in range(100)], shares=False)
    assert Mix(0.1, 99).into(trace, 0) != Mix(0.1, 99).into(trace, 1)


@pytest.mark.parametrize(
    "text", ["", "0.1", "0.1:", ":5", "0:5", "1.1:5", "nan:5", "0.1:0", "0.1:-5", "0.1:1.5", "a:b"]
)
def test_bad_mixes_are_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="--mix") as caught:
        Mix.parse(text)
    assert "\n" not in str(caught.value)


def test_a_mix_is_read() -> None:
    assert Mix.parse("0.1:8192") == Mix(0.1, 8192)
    assert Mix.parse("1:1") == Mix(1.0, 1)


def test_prompts_share_what_the_trace_shared() -> None:
    left = Recorded(0, 1300, 1, blocks=(7, 8, 9))
    right = Recorded(0, 1100, 1, blocks=(7, 8, 11))
    ours, theirs = (prompt_tokens(one, 0, 320, 5) for one in (left, right))
    assert (len(ours), len(theirs)) == (1300, 1100)
    assert (ours[:1024] == theirs[:1024]).all()
    assert (ours[1024:1100] != theirs[1024:]).any()
    assert ours.dtype == np.int32
    assert 100 <= ours.min() <= ours.max() < 220
    assert (prompt_tokens(left, 3, 320, 5) == ours).all()
    assert (prompt_tokens(left, 3, 320, 6) != ours).any()


def test_prompts_without_blocks_share_nothing() -> None:
    one = Recorded(0, 300, 1)
    first, second = (prompt_tokens(one, index, 5000, 0) for index in (0, 1))
    assert (first[:16] != second[:16]).any()
    assert (prompt_tokens(one, 0, 5000, 0) == first).all()


def test_texts_become_ids() -> None:
    trace = Trace("t", [Recorded(0, 1, 1, text="hello", answer=""), Recorded(1, 4, 2)], shares=True)
    spoken, silent = trace.tokenised(lambda text: [ord(letter) for letter in text]).requests
    assert spoken.prompt is not None
    assert prompt_tokens(spoken, 0, 320, 0).tolist() == [104, 101, 108, 108, 111]
    assert (spoken.tokens_in, spoken.tokens_out) == (5, 1)
    assert silent == trace.requests[1]
    mixed = Mix(1.0, 40).into(trace, 0).requests[0]
    assert len(prompt_tokens(mixed, 0, 320, 0)) == 40


def test_what_a_cache_leaves_of_blocks() -> None:
    requests = [
        Recorded(0, 1300, 1, blocks=(1, 2, 3)),
        Recorded(1, 1300, 1, blocks=(1, 2, 3)),
        Recorded(2, 1100, 1, blocks=(1, 2, 4)),
        Recorded(3, 1100, 1, blocks=(5, 6, 4)),
        Recorded(4, 400, 1),
        Recorded(5, 400, 1),
    ]
    # What is known but stands behind something new is not covered.
    assert uncached_tokens(requests).tolist() == [1300, 1, 76, 1100, 400, 400]
    gap = [Recorded(0, 1024, 1, blocks=(1, 2)), Recorded(1, 1536, 1, blocks=(9, 2, 3))]
    assert uncached_tokens(gap).tolist() == [1024, 1536]


def test_what_a_cache_leaves_of_ids() -> None:
    def of(*ids: int) -> Recorded:
        return Recorded(0, len(ids), 1, prompt=np.array(ids, dtype=np.int32))

    requests = [of(1, 2, 3, 4, 5), of(1, 2, 3, 4, 9), of(1, 2, 9, 4), of(3, 4, 1, 2), of(1, 2, 3)]
    # Pages of two: the fifth id of the first is in no whole page.
    assert uncached_tokens(requests, page_size=2).tolist() == [5, 1, 2, 4, 1]


def test_the_cache_of_the_committed_rows() -> None:
    requests = read_trace(MOONCAKE, 0).requests
    left = uncached_tokens(requests)
    assert left[0] == requests[0].tokens_in
    assert all(0 < part <= one.tokens_in for part, one in zip(left, requests, strict=True))
    share = 1 - left.sum() / sum(one.tokens_in for one in requests)
    seen: set[int] = set()
    covered = 0
    for one in requests:
        hits = 0
        while hits < len(one.blocks) and one.blocks[hits] in seen:
            hits += 1
        covered += min(hits * 512, one.tokens_in - 1)
        seen.update(one.blocks)
    assert share == pytest.approx(covered / sum(one.tokens_in for one in requests))
    assert 0.02 < share < 0.5
