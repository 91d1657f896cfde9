"""Hang-ups, pings, deaths and restarts."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from serving.api import generation as generation_module
from serving.api import service as service_module
from serving.errors import EngineDeadError, ModelError
from serving.messages import EngineStats
from tests.serving.api.server import Server, events, make_service, text_of

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ENDLESS: dict[str, Any] = {**ASK, "ignore_eos": True}


@pytest.mark.parametrize("n", [1, 3])
def test_hanging_up_in_mid_stream_ends_the_work(start: Callable[..., Server], n: int) -> None:
    server = start(delay=0.01)
    with server.client() as client:
        body = {**ENDLESS, "stream": True, "n": n}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            while "hello" not in next(lines):
                pass
            assert server.engine.running == n
        server.until(lambda: server.engine.running == 0)
    assert [call.ended for call in server.engine.calls] == ["aborted"] * n
    assert server.engine.calls[0].given < 100


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_first_token_ends_the_work(
    start: Callable[..., Server], stream: bool
) -> None:
    server = start(queue_first=True)
    server.call(server.engine.gate.clear)

    async def hang_up() -> None:
        _, port = server.url.rsplit(":", 1)
        _, writer = await asyncio.open_connection("127.0.0.1", int(port))
        body = json.dumps({**ENDLESS, "stream": stream}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.to_thread(server.until, lambda: server.engine.running == 1)
        writer.close()
        await writer.wait_closed()

    asyncio.run(hang_up())
    server.until(lambda: server.engine.running == 0)
    assert server.engine.calls[0].ended == "aborted"


def test_pings_while_queued(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "PING_SECONDS", 0.05)
    server = start(queue_first=True)
    server.call(server.engine.gate.clear)
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        server.call(server.engine.gate.set)
        rest = "\n".join(lines)
    chunks = [line for line in rest.split("\n") if line.startswith("data: ")]
    assert chunks[-1] == "data: [DONE]"


def test_death_in_mid_stream_is_one_error_event(start: Callable[..., Server]) -> None:
    server = start(delay=0.005)
    server.call(server.engine.restart_gate.clear)
    with server.client() as client:
        with client.stream(
            "POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}
        ) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if "hello" in line:
                    server.call(server.engine.die)
        found = events("\n".join(lines) + "\n")
        assert found[-1]["error"]["code"] == "engine_restarting"
        assert found[-1]["error"]["type"] == "service_unavailable"
        assert all("error" not in chunk for chunk in found[:-1])
        assert text_of(found[:-1])

        health = client.get("/health")
        assert health.status_code == 503
        assert health.headers["retry-after"]
        assert health.json()["error"]["code"] == "engine_restarting"
        refused = client.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert 'lectern_engine_up{model_name="tiny"} 0.0' in client.get("/metrics").text

        server.call(server.engine.restart_gate.set)
        server.until(lambda: server.service.state == "ready")
        assert client.get("/health").status_code == 200
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        text = client.get("/metrics").text
        assert 'lectern_engine_restarts_total{model_name="tiny"} 1.0' in text


def test_a_stream_waits_while_stages_are_replaced(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lectern")
    server = start(delay=0.005)
    body = {**ENDLESS, "max_tokens": 60}
    with server.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        stream = client.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
        with stream as response:
            lines: list[str] = []
            source = response.iter_lines()
            while "hello" not in "".join(lines):
                lines.append(next(source))
            server.call(lambda: server.engine.lose_stages("Stage 1 was killed."))

            health = client.get("/health")
            assert health.status_code == 503
            assert health.headers["retry-after"]
            assert health.json()["error"]["code"] == "engine_restarting"
            assert "Stage 1 was killed." in health.json()["error"]["message"]
            assert 'lectern_engine_up{model_name="tiny"} 0.0' in client.get("/metrics").text
            # Another dies before they are back.
            server.call(lambda: server.engine.lose_stages("Stage 0 was killed."))
            assert "Stage 0" in client.get("/health").json()["error"]["message"]
            server.call(server.engine.have_stages)
            lines += source
        found = events("\n".join(lines) + "\n")
        assert found[-1] == "[DONE]"
        assert text_of(found) == whole["choices"][0]["message"]["content"]
        assert client.get("/health").status_code == 200
        server.call(lambda: server.service.take_stats(EngineStats(restarts=2)))
        text = client.get("/metrics").text
    assert 'lectern_engine_up{model_name="tiny"} 1.0' in text
    assert 'lectern_engine_stage_restarts_total{model_name="tiny"} 2.0' in text
    assert 'lectern_engine_restarts_total{model_name="tiny"} 0.0' in text
    first, second, last = [
        one.__dict__["fields"] for one in caplog.records if "fields" in one.__dict__
    ]
    assert first == {"reason": "Stage 1 was killed.", "requests": 1}
    assert second == {"reason": "Stage 0 was killed.", "requests": 1}
    assert last["seconds"] > 0


def test_a_request_that_comes_while_stages_are_replaced_is_served(
    start: Callable[..., Server],
) -> None:
    server = start()
    server.call(lambda: server.engine.lose_stages("Stage 1 was killed."))

    async def mend() -> None:
        while server.engine.running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        server.engine.have_stages()

    server._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(mend()))
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_the_driver_may_die_while_it_replaces_stages(start: Callable[..., Server]) -> None:
    server = start()
    server.call(lambda: server.engine.lose_stages("Stage 1 was killed."))
    server.call(server.engine.die)
    server.call(server.engine.have_stages)  # those of the new driver
    server.until(lambda: server.engine.restarts == 1 and server.service.state == "ready")
    with server.client() as client:
        assert client.get("/health").status_code == 200
        assert 'lectern_engine_up{model_name="tiny"} 1.0' in client.get("/metrics").text


def test_death_before_the_answer_is_a_503(start: Callable[..., Server]) -> None:
    server = start()
    server.call(server.engine.gate.clear)

    async def die() -> None:
        while server.engine.running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        server.engine.die()

    server._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(die()))
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=ENDLESS)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_restarting"
    assert response.headers["retry-after"]


async def test_not_ready_before_the_first_token() -> None:
    from serving.api.errors import NotReadyError
    from tests.serving.api.fake_engine import FakeEngine

    engine = FakeEngine(reply=[1], eos=2)
    engine.gate.clear()
    service = make_service(engine, None)
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0.01)
    with pytest.raises(NotReadyError, match="starting"):
        _ = service.engine
    engine.gate.set()
    await starting
    assert service.engine is engine
    await service.close()
    assert engine.closed
    with pytest.raises(NotReadyError, match="stopping"):
        _ = service.engine


async def test_restarting_is_tried_again_and_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.serving.api.fake_engine import FakeEngine

    real_sleep = asyncio.sleep
    naps: list[float] = []
    own = asyncio.get_running_loop()

    async def nap(seconds: float) -> None:
        mine = asyncio.get_running_loop() is own  # or a server of other tests, in its thread
        if mine:
            naps.append(seconds)
        await real_sleep(0 if mine else seconds)

    monkeypatch.setattr(service_module.asyncio, "sleep", nap)
    caplog.set_level(logging.WARNING, "lectern")
    failures: list[str] = []
    gave_up = asyncio.Event()

    def failed(reason: str) -> None:
        failures.append(reason)
        gave_up.set()

    engine = FakeEngine(reply=[1], eos=2)
    service = make_service(engine, None, on_failure=failed)
    await service.start()
    engine.restart_errors = [EngineDeadError("died again")] * 2
    engine.die()
    while engine.restarts == 0 or service.state != "ready":
        await real_sleep(0)
    assert naps == [1.0, 2.0]
    assert not failures
    assert any("died and is being restarted" in record.message for record in caplog.records)

    engine.restart_errors = [ModelError("The weights are gone.")]
    engine.die()
    await asyncio.wait_for(gave_up.wait(), 5)
    assert failures == ["The weights are gone."]
    assert service.state == "failed"
    await service.close()


def test_metrics(server: Server) -> None:
    with server.client() as client:
        server.call(lambda: server.service.take_stats(server.engine.picture))
        server.call(lambda: server.service.take_stats(server.engine.picture))
        client.post("/v1/chat/completions", json={**ASK, "max_tokens": 4})
        client.post("/v1/chat/completions", json=ASK)
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in response.text.splitlines()
        if not line.startswith("#")
    }
    prompt = sum(len(call.prompt) for call in server.engine.calls)
    label = 'model_name="tiny"'
    expected = {
        f"lectern_engine_up{{{label}}}": 1,
        f"lectern_engine_prompt_tokens_total{{{label}}}": prompt,
        f'lectern_engine_requests_finished_total{{finish_reason="length",{label}}}': 1,
        f'lectern_engine_requests_finished_total{{finish_reason="stop",{label}}}': 1,
        f"lectern_engine_time_to_first_token_seconds_count{{{label}}}": 2,
        f"lectern_engine_time_per_output_token_seconds_count{{{label}}}": 2,
        f"lectern_engine_request_seconds_count{{{label}}}": 2,
        f"lectern_engine_queue_seconds_count{{{label}}}": 2,
        f'lectern_engine_kv_pages{{{label},state="free"}}': 10,
        f"lectern_engine_preemptions_total{{{label}}}": 3,
        f"lectern_engine_microbatches_total{{{label}}}": 2,
        f'lectern_engine_microbatch_tokens_total{{kind="prefill",{label}}}': 10,
        f'lectern_engine_stage_seconds_total{{{label},stage="0",state="busy"}}': 1.5,
        f'lectern_engine_microbatch_size_tokens_count{{kind="decode",{label}}}': 2,
        f'lectern_engine_step_prediction_error_ratio{{{label},stage="0"}}': 0.25,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert values[f"lectern_engine_generation_tokens_total{{{label}}}"] >= 5


def test_logs_hold_ids_and_no_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lectern")
    with server.client() as client:
        for stream in (False, True):
            secret = [{"role": "user", "content": "MYSECRET"}]
            client.post(
                "/v1/chat/completions",
                json={**ASK, "messages": secret, "stream": stream},
                headers={"x-request-id": "trace-7"},
            )
    found = [record for record in caplog.records if record.name == "lectern.engine"]
    assert len(found) == 2
    for record in found:
        fields = record.__dict__["fields"]
        assert fields["request"] == "trace-7"
        assert fields["outcome"] == "done"
        assert fields["completion_tokens"] > 5
        assert "MYSECRET" not in str(record.__dict__)
        assert "hello" not in str(record.__dict__)
