"""The official client against the real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from tests.serving.api.conftest import REPLY
from tests.serving.api.server import Server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert model.model_dump()["max_model_len"] == 256
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == REPLY
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == REPLY
    assert chunks[-1].usage == answer.usage
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[1, 2], max_tokens=3, extra_body={"ignore_eos": True, "top_k": 3}
    )
    assert answer.choices[0].finish_reason == "length"
    stream = client.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == REPLY


def test_errors_have_their_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[1] * 400)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")


def test_leaving_a_stream_aborts(start: Callable[..., Server]) -> None:
    server = start(delay=0.01)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in stream:
            break
        stream.close()
        server.until(lambda: server.engine.running == 0)
    assert server.engine.calls[0].ended == "aborted"


def test_death_in_mid_stream_is_an_api_error(start: Callable[..., Server]) -> None:
    server = start(delay=0.005)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_body={"ignore_eos": True},
        )

        def consume() -> None:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    server.call(server.engine.die)

        with pytest.raises(openai.APIError) as caught:
            consume()
    assert caught.value.code == "engine_restarting"
