"""Backend and engine API together: what the engine is told of a call, and what its refusal is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.app import create_app
from serving.config.service import Service, TtftTarget
from serving.errors import OverloadedError
from tests.backend.conftest import settings_for
from tests.backend.upstream import serve
from tests.backend.world import FakeRetrieval, World, make_world
from tests.serving.api.server import Server

BODY = {"model": "tiny", "prompt": [1] * 10, "max_tokens": 1}


@pytest.fixture
def engine() -> Iterator[Server]:
    with Server(None, reply=[3], eos=2).running() as server:
        yield server


@pytest.fixture
def platform(sqlite_url: str, tmp_path: Path, engine: Server) -> Iterator[World]:
    settings = settings_for(sqlite_url, tmp_path, engine.url)
    with serve(create_app(settings, FakeRetrieval())) as address:
        made = make_world(settings, address)
        yield made
        made.close()


def told(platform: World, engine: Server, **headers: str) -> Service:
    """What the engine is told when the student sends X-Lectern headers."""
    client = platform.client()
    client.headers["authorization"] = f"Bearer {platform.key()}"
    client.headers |= {f"X-Lectern-{k.replace('_', '-')}": v for k, v in headers.items()}
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    service = engine.engine.calls[-1].service
    assert service is not None
    return service


def test_a_student_s_call_has_the_class_of_its_key_and_weaker_targets(
    platform: World, engine: Server
) -> None:
    tenant = f"user-{platform.users['student'].id}"
    plain = Service(tenant=tenant, ttft=TtftTarget(2.0, 0.0, 5.0), tpot=0.1)
    assert told(platform, engine) == plain
    assert told(platform, engine, Tenant="x", Class="interactive", Priority="-1") == plain
    assert told(platform, engine, TTFT_Ms="1", TPOT_Ms="1") == plain
    assert told(platform, engine, Program="p", TTFT_Ms="9000", TPOT_Ms="none") == Service(
        tenant=tenant, program="p", ttft=TtftTarget(9.0, 0.0, 5.0), tpot=None
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_reaches_the_student_before_any_byte(
    platform: World, engine: Server, stream: bool
) -> None:
    engine.engine.refuses = lambda call: OverloadedError("Too many requests are waiting.", 11.2)
    client = platform.client()
    client.headers["authorization"] = f"Bearer {platform.key()}"
    answer = client.post("/v1/completions", json={**BODY, "stream": stream})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "12"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "engine_overloaded")
    used = platform.client("student").get("/api/usage").json()["budget_used_today"]
    assert used == 0
