"""A request that the engine refuses because too many wait: 429 before any byte of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from serving.errors import OverloadedError
from tests.serving.api.fake_engine import Call
from tests.serving.api.server import Server

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TOLD = "Too many requests are waiting; send the request again in 12 s."
REFUSED = 'lectern_engine_requests_refused_total{model_name="tiny"}'


def every(seconds: float = 11.2) -> Callable[[Call], OverloadedError]:
    return lambda call: OverloadedError(TOLD, seconds)


@pytest.mark.parametrize("queue_first", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_refusal_is_a_429(
    start: Callable[..., Server], path: str, stream: bool, queue_first: bool
) -> None:
    server = start(queue_first=queue_first)
    server.engine.refuses = every()
    body = ASK if path.startswith("chat") else {"model": "tiny", "prompt": "hi"}
    with server.client() as client:
        answer = client.post(f"/v1/{path}", json={**body, "stream": stream})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "12"
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"] == {
            "message": TOLD,
            "type": "rate_limit_error",
            "param": None,
            "code": "engine_overloaded",
        }
        figures = client.get("/metrics").text
        assert f"{REFUSED} 1.0" in figures
        finished = [line for line in figures.splitlines() if "requests_finished_total{" in line]
        assert {line.rsplit(" ", 1)[1] for line in finished} == {"0.0"}
        assert server.engine.running == 0
        server.engine.refuses = lambda call: None
        assert client.post(f"/v1/{path}", json={**body, "stream": stream}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_sequence_refuses_the_request(
    start: Callable[..., Server], stream: bool
) -> None:
    server = start(queue_first=True)
    last = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "ignore_eos": True, "stream": stream}

    def refuses(call: Call) -> OverloadedError | None:
        return OverloadedError(TOLD, 0.0) if len(server.engine.calls) == 4 else None

    server.engine.refuses = refuses
    with server.client() as client:
        answer = client.post("/v1/completions", json=last)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert f"{REFUSED} 1.0" in client.get("/metrics").text
    server.until(lambda: server.engine.running == 0)
    assert len(server.engine.calls) == 4


def test_a_refusal_goes_before_what_came_of_other_sequences(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()

    async def at_once(call: Call) -> None:
        """No pause: the first choice is there when the second one is refused."""

    monkeypatch.setattr(server.engine, "_wait", at_once)
    server.engine.refuses = lambda call: OverloadedError(TOLD, 3.0) if call.choice else None
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json={**ASK, "n": 2, "stream": True})
    assert [call.ended for call in server.engine.calls] == ["stop", "aborted"]
    assert answer.status_code == 429


def test_the_official_client_sees_a_rate_limit(start: Callable[..., Server]) -> None:
    server = start()
    server.engine.refuses = every()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "hi"}], stream=stream
                )
            assert refused.value.code == "engine_overloaded"
            assert refused.value.response.headers["retry-after"] == "12"
