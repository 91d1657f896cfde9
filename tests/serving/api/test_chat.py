"""Chat completions over a real socket: frames, fields, usage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serving.tokenizer import Tokenizer
from tests.serving.api.conftest import REPLY
from tests.serving.api.server import Server, events, text_of

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def post(server: Server, **fields: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/chat/completions", json={**ASK, **fields})


def test_a_whole_answer(server: Server, tokenizer: Tokenizer) -> None:
    response = post(server)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = tokenizer.apply_chat_template(ASK["messages"])
    tokens = len(tokenizer.encode(REPLY)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert server.engine.calls[0].prompt == prompt
    assert response.headers["x-request-id"].startswith("req-")


def test_a_stream_s_frames(server: Server) -> None:
    response = post(server, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    chunks = events(response.text)
    assert chunks[-1] == "[DONE]"
    chunks = chunks[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == REPLY
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "tiny", "chat.completion.chunk")
    }
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(len(c["choices"]) == 1 and "usage" not in c for c in chunks)
    # One character is never split over chunks.
    assert "\ufffd" not in response.text


def test_usage_comes_only_when_asked_for(server: Server) -> None:
    chunks = events(post(server, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == post(server).json()["usage"]
    assert all(c["usage"] is None for c in chunks[:-2])
    chunks = events(post(server, stream=True, stream_options={"include_usage": False}).text)
    assert all("usage" not in c for c in chunks[:-1])


def test_cached_tokens_are_told(start: Callable[..., Server]) -> None:
    details = post(start(cached=16)).json()["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 16}


def test_several_choices(server: Server) -> None:
    body = post(server, n=3, seed=5).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in body["choices"]} == {REPLY}
    assert sorted(call.choice for call in server.engine.calls) == [0, 1, 2]
    chunks = events(post(server, n=3, stream=True).text)[:-1]
    for index in range(3):
        own = [c for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        assert text_of(own) == REPLY
        assert own[-1]["choices"][0]["finish_reason"] == "stop"


def test_max_tokens_and_its_new_name(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = post(server, **{name: 2}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2
    assert post(server, max_tokens=2, max_completion_tokens=2).status_code == 200
    assert post(server, max_tokens=2, max_completion_tokens=3).status_code == 400
    post(server)
    # Without either the answer may fill the context.
    assert server.engine.calls[-1].params.max_tokens is None


def test_sampling_fields_reach_the_engine(server: Server) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 11, "stop": ["xyz"],
        "stop_token_ids": [3, 4], "ignore_eos": True, "min_tokens": 2, "max_tokens": 9,
    }  # fmt: skip
    assert post(server, cache_salt="course-1", **fields).status_code == 200
    call = server.engine.calls[-1]
    assert {name: getattr(call.params, name) for name in fields} == fields
    assert call.cache_salt == "course-1"
    post(server, temperature=1, top_k=-1, stop="one")
    assert server.engine.calls[-1].params.stop == ["one"]


@pytest.mark.parametrize("per_output", [1, 4, 50])
def test_stop_strings_end_the_answer_and_the_engine(
    start: Callable[..., Server], per_output: int
) -> None:
    server = start(per_output=per_output, repeat=20)
    for stop, text in (("世界", "hello "), (["😀 h", "zz"], "hello 世界"), ("llo 世", "he")):
        whole = post(server, stop=stop)
        choice = whole.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        chunks = events(post(server, stop=stop, stream=True).text)[:-1]
        seen = ""
        for chunk in chunks:
            seen += text_of([chunk])
            assert text.startswith(seen)
        assert seen == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert server.engine.running == 0
        assert server.engine.calls[-1].ended == "aborted"


def test_an_unfinished_last_character_is_the_same_both_ways(server: Server) -> None:
    body = post(server, max_tokens=3).json()
    text = body["choices"][0]["message"]["content"]
    assert text == "hello \ufffd"
    assert text_of(events(post(server, max_tokens=3, stream=True).text)) == text


def test_log_probabilities(server: Server, tokenizer: Tokenizer) -> None:
    body = post(server, logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    ids = tokenizer.encode(REPLY)
    assert len(content) == len(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == REPLY
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    # Minus infinity is no JSON.
    assert content[0]["top_logprobs"][1]["logprob"] == -9999.0
    chunks = events(post(server, logprobs=True, top_logprobs=2, stream=True).text)[:-1]
    streamed = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    plain = post(server, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_log_probabilities_do_not_give_a_stop_string_away(server: Server) -> None:
    for stream in (False, True):
        response = post(server, logprobs=True, stop="lo 世界", stream=stream)
        if stream:
            entries = [
                entry
                for chunk in events(response.text)[:-1]
                for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
            ]
        else:
            choice = response.json()["choices"][0]
            assert choice["message"]["content"] == "hel"
            entries = choice["logprobs"]["content"]
        # `hello` is one token, and half of it belongs to the stop string.
        assert entries == []


def test_developers_are_systems_and_parts_are_joined(server: Server, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
    ]
    assert post(server, messages=messages).status_code == 200
    text = tokenizer.decode(server.engine.calls[-1].prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_harmless_fields_are_ignored_and_unknown_ones_named(server: Server) -> None:
    response = post(
        server, user="u", metadata={"a": "b"}, store=True, service_tier="auto", tools=[],
        response_format={"type": "text"}, logit_bias={}, parallel_tool_calls=True, tool_choice=None,
        x_trace="1",
    )  # fmt: skip
    assert response.status_code == 200
    assert response.headers["x-lectern-ignored"] == "x_trace"


def test_special_tokens_can_be_shown(start: Callable[..., Server]) -> None:
    server = start("a<|im_start|>b")
    assert post(server).json()["choices"][0]["message"]["content"] == "ab"
    shown = post(server, skip_special_tokens=False).json()
    assert shown["choices"][0]["message"]["content"] == "a<|im_start|>b"
