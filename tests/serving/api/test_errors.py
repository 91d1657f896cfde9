"""Whatever a client sends, the answer is right or an error object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.api.server import Server

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".") or "?" in body["error"]["message"]
    return dict(body["error"])


BAD_FIELDS: list[tuple[str, Any]] = [
    ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("temperature", 1000),
    ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("top_k", 1.5), ("min_p", 2),
    ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", -3),
    ("max_tokens", 0), ("max_tokens", "5"), ("max_tokens", 5.0), ("max_tokens", -1),
    ("max_completion_tokens", 0), ("n", 0), ("n", 129), ("n", "2"), ("seed", 2**70), ("seed", "a"),
    ("stop", 5), ("stop", [1]), ("stop", [""]), ("stop", ["x"] * 17), ("stop", "x" * 1001),
    ("stop_token_ids", 3), ("stop_token_ids", [300]), ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]), ("ignore_eos", 1), ("min_tokens", -1), ("min_tokens", 10_000),
    ("logprobs", 3), ("top_logprobs", 3), ("stream", "yes"), ("stream", 1),
    ("stream_options", {"include_usage": True}), ("cache_salt", 5), ("cache_salt", "x" * 300),
    ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}]),
    ("response_format", {"type": "json_object"}), ("logit_bias", {"5": 1}), ("audio", {}),
    ("modalities", ["text", "audio"]), ("guided_json", {}), ("suffix", "x"),
    ("use_beam_search", True), ("prompt_logprobs", 1), ("max_new_tokens", 5),
    ("max_output_tokens", 5), ("reasoning_effort", "high"), ("reasoning_effort", "very"),
    ("temprature", 0.5), ("max_token", 5), ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", 3), ("add_special_tokens", True), ("priority", True),
    ("messages", []), ("messages", "hi"), ("messages", [5]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda v: str(v)[:30])
def test_a_bad_field_is_named(server_once: Server, name: str, value: Any) -> None:
    with server_once.client() as client:
        response = client.post("/v1/chat/completions", json={**ASK, name: value})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert error["param"].split("[")[0].split(".")[0] == name
    assert server_once.engine.running == 0


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "boss", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0]",
        ),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
    ],
)
def test_a_bad_message_is_named(server_once: Server, message: Any, param: str) -> None:
    with server_once.client() as client:
        response = client.post("/v1/chat/completions", json={**ASK, "messages": [message]})
    assert error_of(response, 400)["param"] == param


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], ["", "x"], [1, "x"], ["x", 1], 5, {}, [1.5], [300], [-1], [True]]
)
def test_a_bad_prompt_is_refused(server_once: Server, prompt: Any) -> None:
    with server_once.client() as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert error_of(response, 400)["param"] == "prompt"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b'{"a":NaN}', b'"\\ud800"', b"[" * 9000],
)
def test_a_bad_body(server_once: Server, content: bytes) -> None:
    with server_once.client() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            response = client.post(path, content=content)
            assert error_of(response, 400)["code"] in ("invalid_json", "invalid_type")


def test_other_statuses(server_once: Server) -> None:
    with server_once.client() as client:
        assert error_of(client.get("/nothing"), 404)["code"] == "not_found"
        assert error_of(client.get("/v1/models/"), 404)["code"] == "model_not_found"
        assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
        assert error_of(client.delete("/v1/models"), 405)
        assert error_of(client.get("/v1/models/other/name"), 404)["code"] == "model_not_found"
        body = {**ASK, "model": "other"}
        error = error_of(client.post("/v1/chat/completions", json=body), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        for model in (None, 5):
            response = client.post("/v1/chat/completions", json={**ASK, "model": model})
            assert error_of(response, 400)["param"] == "model"
        form = client.post("/v1/completions", data={"model": "tiny", "prompt": "x"})
        assert error_of(form, 415)
        large = client.post("/v1/completions", content=b" " * (17 << 20))
        assert error_of(large, 413)


def test_too_long_a_prompt_tells_both_numbers(server_once: Server) -> None:
    with server_once.client() as client:

        def refused(**fields: Any) -> str:
            body = {"model": "tiny", "prompt": [1], **fields}
            error = error_of(client.post("/v1/completions", json=body), 400)
            assert error["code"] == "context_length_exceeded"
            return str(error["message"])

        message = refused(prompt=[1] * 300)
        assert "256" in message
        assert "300" in message
        assert "256" in refused(prompt=[1] * 256)
        message = refused(prompt=[1] * 200, max_tokens=57)
        assert "257" in message
        assert "256" in message
        # Far too long: refused without tokenising it.
        assert "at least" in refused(prompt="x" * 5_000_000)
        fits = {"model": "tiny", "prompt": [1] * 255, "max_tokens": 1}
        assert client.post("/v1/completions", json=fits).status_code == 200
        long = {**ASK, "messages": [{"role": "user", "content": "word " * 300}]}
        error = error_of(client.post("/v1/chat/completions", json=long), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_request_ids(server_once: Server) -> None:
    with server_once.client() as client:
        given = client.get("/health", headers={"x-request-id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        for bad in ("a b", "x" * 200, '"'):
            made = client.get("/health", headers={"x-request-id": bad})
            assert made.headers["x-request-id"] != bad


def test_models_version_health(server_once: Server) -> None:
    with server_once.client() as client:
        listed = client.get("/v1/models").json()
        assert listed == {
            "object": "list",
            "data": [
                {
                    "id": "tiny",
                    "object": "model",
                    "created": 1_700_000_000,
                    "owned_by": "lectern",
                    "max_model_len": 256,
                    "x_lectern": {"untrained": True, "has_tokenizer": True},
                }
            ],
        }
        assert client.get("/v1/models/tiny").json() == listed["data"][0]
        assert client.get("/health").json()["status"] == "ready"
        assert client.get("/version").json()["version"]


def test_an_unforeseen_error_is_a_500_without_details(server_once: Server) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret detail")

    engine = server_once.engine
    engine.generate = broken  # type: ignore[method-assign, assignment]
    try:
        with server_once.client() as client:
            for stream in (False, True):
                response = client.post("/v1/chat/completions", json={**ASK, "stream": stream})
                assert error_of(response, 500)["type"] == "server_error"
                assert "secret" not in json.dumps(response.json())
    finally:
        del engine.generate
