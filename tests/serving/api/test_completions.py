"""/v1/completions, /tokenize and /detokenize, with and without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serving.tokenizer import Tokenizer
from tests.serving.api.conftest import REPLY
from tests.serving.api.server import Server, events, text_of


def post(server: Server, path: str = "/v1/completions", **fields: Any) -> Any:
    with server.client() as client:
        return client.post(path, json={"model": "tiny", **fields})


def test_every_form_of_prompt(server: Server, tokenizer: Tokenizer) -> None:
    hello, world = tokenizer.encode("hello"), tokenizer.encode("世界")
    for prompt, expected in (
        ("hello", [hello]),
        (["hello", "世界"], [hello, world]),
        (hello, [hello]),
        ([hello, world], [hello, world]),
        (["hello", world], [hello, world]),
    ):
        server.engine.calls.clear()
        response = post(server, prompt=prompt)
        assert response.status_code == 200, response.text
        assert [call.prompt for call in server.engine.calls] == expected
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(expected)))
        assert {choice["text"] for choice in choices} == {REPLY}
        assert response.json()["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_of_several_prompts_are_numbered_by_prompt(server: Server) -> None:
    body = post(server, prompt=["hello", "x"], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [call.choice for call in server.engine.calls] == [0, 1, 0, 1]
    assert body["usage"]["prompt_tokens"] == 2


def test_a_stream(server: Server) -> None:
    response = post(server, prompt="hello", stream=True, stream_options={"include_usage": True})
    chunks = events(response.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["prompt_tokens"] == 1
    chunks = chunks[:-2]
    assert text_of(chunks) == REPLY
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_echo(server: Server, tokenizer: Tokenizer) -> None:
    for prompt in ("世界", tokenizer.encode("世界")):
        assert post(server, prompt=prompt, echo=True).json()["choices"][0]["text"] == "世界" + REPLY
        chunks = events(post(server, prompt=prompt, echo=True, stream=True, n=2).text)[:-1]
        for index in (0, 1):
            own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert text_of(own) == "世界" + REPLY
    refused = post(server, prompt="x", echo=True, logprobs=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


def test_log_probabilities(server: Server, tokenizer: Tokenizer) -> None:
    found = post(server, prompt="x", logprobs=2).json()["choices"][0]["logprobs"]
    ids = tokenizer.encode(REPLY)
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(ids)
    assert found["tokens"][0] == "hello"
    assert found["text_offset"][:3] == [0, 5, 6]
    assert found["top_logprobs"][0]["hello"] == -0.5


def test_best_of_is_one_or_n(server: Server) -> None:
    assert post(server, prompt="x", best_of=1).status_code == 200
    assert post(server, prompt="x", best_of=2, n=2).status_code == 200
    assert post(server, prompt="x", best_of=3).json()["error"]["param"] == "best_of"


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_without_tokenizer_serves_token_ids(
    start: Callable[..., Server], stream: bool
) -> None:
    server = start(has_tokenizer=False)
    response = post(server, prompt=[1, 2, 3], max_tokens=4, ignore_eos=True, stream=stream)
    assert response.status_code == 200
    if stream:
        chunks = events(response.text)[:-1]
        assert text_of(chunks) == ""
        assert len(chunks) == 4
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    else:
        body = response.json()
        assert body["choices"][0] == {
            "index": 0, "text": "", "logprobs": None, "finish_reason": "length",
        }  # fmt: skip
        assert body["usage"]["completion_tokens"] == 4


def test_a_folder_without_tokenizer_refuses_text(start: Callable[..., Server]) -> None:
    server = start(has_tokenizer=False)
    message = [{"role": "user", "content": "x"}]
    for path, fields, param in (
        ("/v1/completions", {"prompt": "text"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"prompt": [1], "stop": "x"}, "stop"),
        ("/v1/completions", {"prompt": [1], "echo": True}, "echo"),
        ("/v1/chat/completions", {"messages": message}, "messages"),
        ("/tokenize", {"prompt": "x"}, "prompt"),
        ("/tokenize", {"messages": message}, "messages"),
        ("/detokenize", {"tokens": [1]}, "tokens"),
    ):
        response = post(server, path, **fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, "no_tokenizer")
    with server.client() as client:
        extras = client.get("/v1/models").json()["data"][0]["x_lectern"]
    assert extras == {"untrained": True, "has_tokenizer": False}


def test_tokenize_and_back(server: Server, tokenizer: Tokenizer) -> None:
    found = post(server, "/tokenize", prompt="hello 世界").json()
    ids = tokenizer.encode("hello 世界")
    assert found == {"count": len(ids), "max_model_len": 256, "tokens": ids}
    assert post(server, "/detokenize", tokens=ids).json() == {"prompt": "hello 世界"}
    messages = [{"role": "user", "content": "x"}]
    found = post(server, "/tokenize", messages=messages).json()
    assert found["tokens"] == tokenizer.apply_chat_template(messages)
    text = post(server, "/detokenize", tokens=found["tokens"]).json()["prompt"]
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert post(server, "/tokenize").status_code == 400
    assert post(server, "/tokenize", prompt="", model="tiny").json()["count"] == 0
    assert post(server, "/detokenize", tokens=[300]).json()["error"]["param"] == "tokens"
    assert post(server, "/tokenize", model="other", prompt="x").status_code == 404
