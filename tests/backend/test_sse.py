"""Reading event streams: cut anywhere, nothing lost, the usage event taken out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import ApiError
from backend.gateway.request import read_request
from backend.gateway.sse import EventSplitter, StreamTap, event_json
from backend.upstream import ModelInfo, error_of, estimate_tokens

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def stream(*texts: str, usage: bool = True) -> bytes:
    rows = [{"choices": [{"delta": {"content": text}}], "usage": None} for text in texts]
    events = [json.dumps(row, ensure_ascii=False) for row in rows]
    if usage:
        events.append(json.dumps({"choices": [], "usage": USAGE}))
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


TRICKY = ['"usage": {', "data: [DONE]", '\n\ndata: {"error"', "编译", "a\r\nb", ""]


@given(
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=6)), max_size=6),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
)
def test_tap_takes_out_usage_and_nothing_else(
    texts: list[str], cuts: list[int], keep: bool
) -> None:
    data, tap, out, start = stream(*texts), StreamTap(keep_usage=keep), b"", 0
    for cut in [*sorted(cuts), len(data)]:
        out += tap.feed(data[start:cut])
        start = max(start, cut)
    assert out == stream(*texts, usage=keep)
    assert tap.usage == USAGE
    assert tap.done
    assert not tap.failed
    assert not tap.open_event
    assert tap.events == len(texts)


def test_tap_sees_errors_and_unfinished_streams() -> None:
    tap = StreamTap(keep_usage=False)
    tap.feed(b'data: {"error": {"message": "x"}}\n\n')
    assert tap.failed
    assert not tap.done
    tap.feed(b'data: {"choices"')
    assert tap.open_event


def test_crlf_streams_are_understood() -> None:
    tap = StreamTap(keep_usage=False)
    data = stream("a").replace(b"\n", b"\r\n")
    tap.feed(data)
    assert tap.usage == USAGE
    assert tap.done


def test_an_event_without_end_is_refused() -> None:
    splitter = EventSplitter()
    for _ in range(64):
        splitter.feed(b"x" * 65_536)
    with pytest.raises(ValueError, match="without an end"):
        splitter.feed(b"x")


def test_comments_and_done_are_no_objects() -> None:
    assert event_json(b": ping") is None
    assert event_json(b"data: [DONE]") is None
    assert event_json(b"data: {broken") is None
    assert event_json(b'data:{"a": 1}') == {"a": 1}


MODEL = ModelInfo("demo", 2048, False, True, True)


def test_request_is_cleaned_and_priced() -> None:
    body = {
        "model": "demo",
        "stream": True,
        "cache_salt": "another course's",
        "max_tokens": 64,
        "n": 2,
        "messages": [{"role": "user", "content": "x" * 100}],
        "top_k": 5,
    }
    request = read_request(json.dumps(body).encode(), MODEL, 4096)
    sent = json.loads(request.body)
    assert "cache_salt" not in sent
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["top_k"] == 5
    assert not request.wants_usage
    assert 100 <= request.prompt_bound <= 200
    assert request.answer_bound == 128


def test_unbounded_answers_reserve_the_whole_context() -> None:
    body = {"model": "demo", "prompt": [[1, 2, 3], [4, 5]]}
    request = read_request(json.dumps(body).encode(), MODEL, 4096)
    assert request.answer_bound == 2 * 2048
    assert request.prompt_bound >= 5


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("[]", None),
        ("{", None),
        ("[" * 100_000, None),
        ('{"stream": "yes"}', "stream"),
        ('{"max_tokens": -1}', "max_tokens"),
        ('{"max_tokens": "many"}', "max_tokens"),
        ('{"n": 1.5}', "n"),
        ('{"stream_options": 3}', "stream_options"),
    ],
)
def test_bad_bodies_are_refused_with_the_field(body: str, param: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        read_request(body.encode(), None, 4096)
    assert refused.value.status == 400
    assert refused.value.param == param


@given(st.text())
def test_estimates_are_never_below_nothing(text: str) -> None:
    assert estimate_tokens(text) >= len(text) // 3


def test_upstream_errors_without_an_error_object_get_one() -> None:
    assert error_of(404, b'{"detail": "Not Found"}').code == "not_found"
    assert error_of(500, b"<html>").code == "upstream_error"
    passed = error_of(400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
    assert (passed.code, passed.message) == ("context_length_exceeded", "too long")
    # A key that the model server refuses is not the student's fault.
    assert error_of(401, b"{}").status == 502


def test_many_prompts_reserve_for_each() -> None:
    body = {"model": "demo", "prompt": [[1] * 1000] * 10, "max_tokens": 1}
    assert read_request(json.dumps(body).encode(), MODEL, 4096).prompt_bound >= 10_000


def test_the_largest_of_several_limits_is_reserved() -> None:
    body = {"model": "demo", "prompt": "x", "max_completion_tokens": 1, "max_tokens": 500}
    assert read_request(json.dumps(body).encode(), MODEL, 4096).answer_bound == 500


def test_people_do_not_share_a_prefix_cache() -> None:
    raw = json.dumps({"model": "demo", "prompt": "x"}).encode()
    sent = json.loads(read_request(raw, MODEL, 4096, "user-7").body)
    assert sent["cache_salt"] == "user-7"
    other = ModelInfo("demo", 2048, False, True, is_lectern=False)
    assert "cache_salt" not in json.loads(read_request(raw, other, 4096, "user-7").body)
