"""The /v1 door: pass-through, hang-ups, errors, limits, and the official client."""

import json
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from sqlalchemy import select

from backend.accounts import service as accounts
from backend.accounts.schemas import UserChange
from backend.app import create_app
from backend.database import utcnow
from backend.usage.models import Reservation, TokenBudget, UsageRecord
from tests.backend.conftest import settings_for
from tests.backend.upstream import FakeUpstream, serve
from tests.backend.world import FakeRetrieval, World, make_world, wait_for

QUESTION = [{"role": "user", "content": "hi"}]


def body(**more: object) -> dict[str, object]:
    return {"model": "demo", "messages": QUESTION, **more}


def caller(world: World, name: str = "student") -> httpx2.Client:
    made = world.client()
    made.headers["authorization"] = f"Bearer {world.key(name)}"
    return made


def records(world: World) -> list[UsageRecord]:
    with world.database.read() as session:
        return list(session.execute(select(UsageRecord).order_by(UsageRecord.id)).scalars())


def reserved(world: World) -> int:
    with world.database.read() as session:
        return sum(row.reserved for row in session.execute(select(TokenBudget)).scalars()) + len(
            session.execute(select(Reservation)).scalars().all()
        )


def test_official_client(world: World) -> None:
    client = openai.OpenAI(base_url=world.url + "/v1", api_key=world.key())
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    whole = client.chat.completions.create(model="demo", messages=QUESTION)
    assert whole.choices[0].message.content == "Hello [1] world"
    parts = list(client.chat.completions.create(model="demo", messages=QUESTION, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == "Hello [1] world"
    assert parts[-1].choices[0].finish_reason == "stop"
    with_usage = list(
        client.chat.completions.create(
            model="demo", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage is not None
    assert with_usage[-1].usage.prompt_tokens == 7
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=world.url + "/v1", api_key="sk-no").models.list()
    assert refused.value.code == "invalid_api_key"
    wait_for(lambda: len(records(world)) == 3)
    assert {(r.prompt_tokens, r.completion_tokens, r.status) for r in records(world)} == {
        (7, 5, "complete")
    }
    assert reserved(world) == 0


def test_stream_is_relayed_without_the_usage_event(world: World, fake: FakeUpstream) -> None:
    with caller(world).stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"]
        assert answer.headers["x-ratelimit-limit-tokens"] == "2000000"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 2_000_000
        assert int(answer.headers["x-ratelimit-remaining-requests"]) == 5_999
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in text
    assert fake.bodies[-1]["stream_options"] == {"include_usage": True}


def test_nothing_of_the_client_reaches_the_engine_but_its_body(
    world: World, fake: FakeUpstream
) -> None:
    client = caller(world)
    student = f"user-{world.users['student'].id}"
    client.headers |= {"X-Lectern-Salt": "mine", "X-Request-Id": "my-request-0001"}
    client.headers |= {
        "X-Lectern-Tenant": "user-1000",
        "X-Lectern-Class": "interactive",
        "X-Lectern-Priority": "-1000",
    }
    client.post("/v1/chat/completions", json=body(cache_salt="mine", top_k=3))
    seen = fake.headers[-1]
    assert {name: value for name, value in seen.items() if name.startswith("x-lectern")} == {
        "x-lectern-tenant": student,
        "x-lectern-class": "standard",
    }
    assert "authorization" not in seen
    assert seen["x-request-id"] == "my-request-0001"
    assert fake.bodies[-1]["cache_salt"] == student
    assert fake.bodies[-1]["top_k"] == 3


def service_of(fake: FakeUpstream) -> dict[str, str]:
    prefix = "x-lectern-"
    seen = fake.headers[-1].items()
    return {name.removeprefix(prefix): value for name, value in seen if name.startswith(prefix)}


def test_keys_of_one_user_are_one_tenant(world: World, fake: FakeUpstream) -> None:
    seen = []
    for name in ("student", "student", "stranger"):
        client = caller(world, name)
        assert client.post("/v1/completions", json=body(stream=True)).status_code == 200
        secret = client.headers["authorization"].removeprefix("Bearer ")
        seen.append(service_of(fake)["tenant"])
        assert name not in seen[-1]
        assert secret not in str(fake.headers[-1])
    assert seen[0] == seen[1] != seen[2]


def test_a_client_may_name_its_program_and_ask_for_targets(
    world: World, fake: FakeUpstream
) -> None:
    """Whether they are weaker than its class's is for the engine to see, which knows those."""
    client = caller(world)
    wishes = {"Program": "fix the tests", "TTFT-Ms": "9000", "TPOT-Ms": "none"}
    client.headers |= {f"X-Lectern-{name}": value for name, value in wishes.items()}
    assert client.post("/v1/chat/completions", json=body()).status_code == 200
    assert service_of(fake) == {
        "tenant": f"user-{world.users['student'].id}",
        "class": "standard",
        "program": "fix the tests",
        "ttft-ms": "9000",
        "tpot-ms": "none",
    }


@pytest.mark.parametrize("name", ["X-Lectern-Program", "X-Lectern-TTFT-Ms", "X-Lectern-TPOT-Ms"])
@pytest.mark.parametrize("value", [b"x" * 129, b"caf\xe9", b"a\tb"])
def test_a_bad_wish_is_named(world: World, fake: FakeUpstream, name: str, value: bytes) -> None:
    headers = {name.encode(): value}
    answer = caller(world).post("/v1/chat/completions", json=body(), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert fake.opened == 0
    assert reserved(world) == 0


def test_other_model_servers_are_told_nothing_of_users(world: World, fake: FakeUpstream) -> None:
    fake.owned_by = "somebody else"
    client = caller(world)
    client.headers["X-Lectern-Program"] = "mine"
    assert client.post("/v1/chat/completions", json=body()).status_code == 200
    assert service_of(fake) == {}


OVERLOADED = {
    "message": "Too many requests are waiting; send the request again in 12 s.",
    "type": "rate_limit_error",
    "param": None,
    "code": "engine_overloaded",
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_is_passed_on_and_costs_nothing(
    world: World, fake: FakeUpstream, stream: bool
) -> None:
    fake.error, fake.retry_after = (429, {"error": OVERLOADED}), "12"
    answer = caller(world).post("/v1/chat/completions", json=body(stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "12"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"error": OVERLOADED}
    wait_for(lambda: reserved(world) == 0)
    assert records(world) == []


@pytest.mark.parametrize("given", [None, "soon", "1" * 9])
def test_a_wait_that_is_no_number_of_seconds_is_not_passed_on(
    world: World, fake: FakeUpstream, given: str | None
) -> None:
    fake.error, fake.retry_after = (429, {"error": OVERLOADED}), given
    answer = caller(world).post("/v1/chat/completions", json=body())
    assert answer.headers["retry-after"] == "5"


def test_hang_up_closes_the_stream_upstream(world: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = ["word "] * 1000, 0.02
    client = caller(world)
    for _ in range(5):
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
            next(answer.iter_raw())
    wait_for(lambda: fake.closed_early == 5)
    wait_for(lambda: len(records(world)) == 5)
    assert {(r.status, r.estimated) for r in records(world)} == {("cancelled", True)}
    assert all(r.prompt_tokens > 0 for r in records(world))
    assert reserved(world) == 0


def test_hang_up_closes_a_call_that_does_not_stream(world: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = ["word "] * 1000, 0.02
    content = json.dumps(body()).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {world.key()}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    host, _, port = world.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        wait_for(lambda: fake.opened == 1)
    wait_for(lambda: fake.closed_early == 1)
    wait_for(lambda: [r.status for r in records(world)] == ["cancelled"])


def test_errors_of_the_engine_are_passed_on_and_cost_nothing(
    world: World, fake: FakeUpstream
) -> None:
    error = {"message": "too long", "type": "invalid_request_error", "param": "messages"}
    fake.error = (400, {"error": error | {"code": "context_length_exceeded"}})
    for stream in (False, True):
        answer = caller(world).post("/v1/chat/completions", json=body(stream=stream))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert answer.json()["error"]["param"] == "messages"
    wait_for(lambda: reserved(world) == 0)
    assert records(world) == []


def test_error_event_in_mid_stream_is_passed_on(world: World, fake: FakeUpstream) -> None:
    fake.error_after = 2
    client = openai.OpenAI(base_url=world.url + "/v1", api_key=world.key())
    parts = client.chat.completions.create(model="demo", messages=QUESTION, stream=True)
    seen = [next(parts).choices[0].delta.content for _ in range(3)]
    with pytest.raises(openai.APIError) as failed:
        next(parts)
    assert failed.value.code == "engine_dead"
    assert "".join(filter(None, seen)) == "Hello "
    wait_for(lambda: [r.status for r in records(world)] == ["failed"])


def test_engine_that_dies_in_mid_stream_gives_an_error_event(
    world: World, fake: FakeUpstream
) -> None:
    fake.cut_after = 2
    client = openai.OpenAI(base_url=world.url + "/v1", api_key=world.key())
    with pytest.raises(openai.APIError) as failed:
        list(client.chat.completions.create(model="demo", messages=QUESTION, stream=True))
    assert failed.value.code == "upstream_cut"
    wait_for(lambda: [r.status for r in records(world)] == ["failed"])
    assert reserved(world) == 0


def test_engine_that_is_not_there(sqlite_url: str, tmp_path: Path, free_port: int) -> None:
    settings = settings_for(sqlite_url, tmp_path, f"http://127.0.0.1:{free_port}")
    with serve(create_app(settings, FakeRetrieval())) as address:
        world = make_world(settings, address)
        client = caller(world)
        for answer in (
            client.get("/v1/models"),
            client.post("/v1/chat/completions", json=body()),
            client.post("/v1/chat/completions", json=body(stream=True)),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "upstream_unavailable"
        wait_for(lambda: reserved(world) == 0)
        assert records(world) == []
        assert world.client("student").get("/api/me").json()["model"]["available"] is False
        world.close()


def test_key_for_the_upstream_from_a_file(
    sqlite_url: str, tmp_path: Path, fake: FakeUpstream
) -> None:
    (tmp_path / "key").write_text("secret-of-upstream\n")
    settings = settings_for(
        sqlite_url, tmp_path, fake.url + "/v1/", upstream_key_file=tmp_path / "key"
    )
    with serve(create_app(settings, FakeRetrieval())) as address:
        world = make_world(settings, address)
        assert caller(world).post("/v1/chat/completions", json=body()).status_code == 200
        world.close()
    assert fake.headers[-1]["authorization"] == "Bearer secret-of-upstream"


def test_unknown_routes_and_methods(world: World) -> None:
    client = caller(world)
    for answer in (client.post("/v1/files"), client.get("/v1/chat/completions")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"


class TestLimits:
    @pytest.fixture
    def more_settings(self) -> dict[str, object]:
        return {"daily_tokens": 3000, "max_request_bytes": 20_000, "requests_per_minute": 200}

    def test_quota_race(self, world: World, fake: FakeUpstream) -> None:
        """200 calls at the limit: as many as the budget carries are answered, none too many."""
        fake.delay = 0.05
        client = caller(world)

        def call(_: int) -> tuple[int, str | None]:
            answer = client.post("/v1/chat/completions", json=body(max_tokens=100))
            return answer.status_code, answer.headers.get("x-should-retry")

        with ThreadPoolExecutor(40) as pool:
            outcomes = Counter(pool.map(call, range(200)))
        assert set(outcomes) <= {(200, None), (429, "false")}
        wait_for(lambda: reserved(world) == 0)
        with world.database.read() as session:
            used = session.execute(select(TokenBudget.used)).scalar_one()
        assert used == 12 * outcomes[200, None]
        assert used <= 3000

    def test_official_client_does_not_retry_a_spent_budget(
        self, world: World, fake: FakeUpstream
    ) -> None:
        client = openai.OpenAI(base_url=world.url + "/v1", api_key=world.key())
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2048, n=2)
        assert refused.value.code == "insufficient_quota"
        assert fake.opened == 0

    def test_requests_a_minute(self, world: World) -> None:
        client = caller(world)
        # The window is a minute of the clock: two of them hold at most 400.
        codes = Counter(
            client.post("/v1/completions", json={"n": "x"}).status_code for _ in range(401)
        )
        assert codes[429] >= 1
        last = client.post("/v1/completions", json={"n": "x"})
        if last.status_code == 429:
            assert last.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(last.headers["retry-after"]) <= 60

    def test_large_bodies_are_refused(self, world: World) -> None:
        client = caller(world)
        long = body(messages=[{"role": "user", "content": "x" * 30_000}])
        told = client.post("/v1/chat/completions", json=long)

        def pieces() -> object:
            yield from (b"x" * 5_000 for _ in range(6))

        untold = client.post("/v1/chat/completions", content=pieces())
        for answer in (told, untold):
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"


def test_deactivating_ends_running_streams(world: World, fake: FakeUpstream) -> None:
    """Within five seconds, also when another process does it (no call of this backend)."""
    fake.words, fake.delay = ["word "] * 2000, 0.02
    ended = threading.Event()
    seen: list[str] = []
    client = caller(world)

    def read() -> None:
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
            seen.extend(answer.iter_lines())
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    wait_for(lambda: fake.opened == 1)
    accounts.change_user(world.database, world.users["student"].id, UserChange(active=False))
    began = utcnow()
    assert ended.wait(5)
    assert (utcnow() - began).total_seconds() < 5
    last = json.loads(seen[-2].removeprefix("data: "))
    assert last["error"]["code"] == "access_ended"
    wait_for(lambda: fake.closed_early == 1)


def test_revoking_a_key_ends_its_streams(world: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = ["word "] * 2000, 0.02
    student = world.client("student")
    made = student.post("/api/keys", json={"name": "k"}).json()
    headers = {"authorization": f"Bearer {made['key']}"}
    with student.stream(
        "POST", "/v1/chat/completions", json=body(stream=True), headers=headers
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert world.client("student").delete(f"/api/keys/{made['id']}").status_code == 204
        assert any("access_ended" in line for line in lines)


def test_many_streams_at_once(world: World, fake: FakeUpstream) -> None:
    """More than the pool of a default client would carry, all complete, nothing left behind."""
    fake.words, fake.delay = ["word "] * 10, 0.05
    limits = httpx2.Limits(max_connections=None)
    client = httpx2.Client(base_url=world.url, timeout=60, trust_env=False, limits=limits)
    client.headers["authorization"] = f"Bearer {world.key()}"

    def call(_: int) -> bool:
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
            return answer.read().endswith(b"data: [DONE]\n\n")

    with client, ThreadPoolExecutor(120) as pool:
        assert all(pool.map(call, range(120)))
    assert fake.finished == 120
    wait_for(lambda: reserved(world) == 0)
    metrics = httpx2.get(world.url + "/metrics").text
    assert "lectern_backend_gateway_streams 0.0" in metrics
    assert 'lectern_backend_gateway_tokens_total{kind="completion"} 600.0' in metrics
