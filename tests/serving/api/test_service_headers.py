"""X-Lectern headers: what the engine is told of a request's service, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from serving.api.classes import service_classes
from serving.api.service_headers import read_wanted
from serving.config.service import Service, TtftTarget
from serving.errors import InvalidRequestError
from tests.serving.api.server import Server

CLASSES = service_classes(more=["long=max(2+0.01*tokens,5*own),0.2", "late=60,none"])
STANDARD = TtftTarget(2.0, 0.0, 5.0)
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def wanted(tokens: int = 100, **headers: str) -> Service:
    given = {f"X-Lectern-{name.replace('_', '-')}": value for name, value in headers.items()}
    return read_wanted(given, CLASSES).of(tokens)


def test_without_headers_the_class_is_standard() -> None:
    assert wanted() == Service(ttft=STANDARD, tpot=0.1)
    assert wanted(Class="standard") == wanted()
    assert wanted(Class="", Tenant="", TTFT_Ms="", TPOT_Ms="", Program="", Priority="") == wanted()


def test_every_header_counts() -> None:
    assert wanted(
        Tenant="user-7", Class="interactive", Program="fix the tests #2", Priority="-1000"
    ) == Service(
        tenant="user-7",
        program="fix the tests #2",
        priority=-1000,
        ttft=TtftTarget(0.5, 0.0005),
        tpot=0.05,
    )
    assert wanted(Class="batch") == Service()


def test_targets_alone_are_taken_as_they_are() -> None:
    assert wanted(TTFT_Ms="250", TPOT_Ms="12.5") == Service(ttft=TtftTarget(0.25), tpot=0.0125)
    assert wanted(TTFT_Ms="none") == Service(ttft=None, tpot=0.1)
    assert wanted(TPOT_Ms="none") == Service(ttft=STANDARD, tpot=None)


@pytest.mark.parametrize(
    ("name", "ttft", "tokens", "found"),
    [
        ("interactive", "250", 100, TtftTarget(0.55)),  # the class's own is weaker
        ("interactive", "600", 100, TtftTarget(0.6)),
        ("interactive", "600", 1000, TtftTarget(1.0)),
        ("standard", "1", 100, TtftTarget(2.0, 0.0, 5.0)),  # own prefill may still be longer
        ("standard", "8000", 100, TtftTarget(8.0, 0.0, 5.0)),
        ("long", "2500", 10, TtftTarget(2.5, 0.0, 5.0)),
        ("long", "2500", 100, TtftTarget(3.0, 0.0, 5.0)),
        ("late", "none", 100, None),
        ("batch", "1", 100, None),
    ],
)
def test_of_class_and_target_the_weaker_counts(
    name: str, ttft: str, tokens: int, found: TtftTarget | None
) -> None:
    assert wanted(tokens, Class=name, TTFT_Ms=ttft).ttft == found


@pytest.mark.parametrize(
    ("name", "tpot", "found"),
    [
        ("standard", "10", 0.1),
        ("standard", "500", 0.5),
        ("standard", "none", None),
        ("late", "5", None),
    ],
)
def test_the_same_for_tokens_after_the_first(name: str, tpot: str, found: float | None) -> None:
    assert wanted(Class=name, TPOT_Ms=tpot).tpot == found


BAD = [
    ("Class", "gold"), ("Class", "Standard"), ("Class", "x" * 999),
    ("TTFT-Ms", "0"), ("TTFT-Ms", "0.0"), ("TTFT-Ms", "-5"), ("TTFT-Ms", "soon"),
    ("TTFT-Ms", "nan"), ("TTFT-Ms", "1e9"), ("TTFT-Ms", "1_000"), ("TTFT-Ms", "9" * 400),
    ("TPOT-Ms", "inf"), ("TPOT-Ms", "1,5"), ("TPOT-Ms", "None"),
    ("Tenant", "x" * 129), ("Tenant", "caf\xe9"), ("Tenant", "a\tb"),
    ("Program", "x" * 129), ("Program", "\xff"),
    ("Priority", "1001"), ("Priority", "-1001"), ("Priority", "1.5"), ("Priority", "high"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_header_is_named(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_wanted({f"X-Lectern-{name}": value}, CLASSES)
    assert refused.value.param == f"X-Lectern-{name}"
    assert refused.value.message.endswith(".")


def test_over_http_the_engine_is_told_for_every_sequence(server: Server) -> None:
    headers = {"x-lectern-tenant": "user-7", "X-LECTERN-CLASS": "interactive"}
    body = {"model": "tiny", "prompt": [[1] * 10, [1] * 100], "n": 2, "max_tokens": 1}
    with server.client() as client:
        slow = {"X-Lectern-TTFT-Ms": "530"}
        answer = client.post("/v1/completions", json=body, headers=headers | slow)
        assert answer.status_code == 200
        assert client.post("/v1/chat/completions", json=ASK, headers=headers).status_code == 200
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    calls = server.engine.calls
    assert {call.service.tenant for call in calls[:5] if call.service} == {"user-7"}
    found = [(len(call.prompt), call.service.ttft) for call in calls[:4] if call.service]
    assert sorted(found, key=lambda pair: pair[0]) == [
        (10, TtftTarget(0.53)), (10, TtftTarget(0.53)),
        (100, TtftTarget(0.55)), (100, TtftTarget(0.55)),
    ]  # fmt: skip
    assert calls[4].service == Service(tenant="user-7", ttft=TtftTarget(0.5, 0.0005), tpot=0.05)
    assert calls[5].service == Service(ttft=STANDARD, tpot=0.1)


def test_over_http_a_bad_header_is_a_400(server_once: Server) -> None:
    before = len(server_once.engine.calls)
    with server_once.client() as client:
        for stream in (False, True):
            for name, value in (("X-Lectern-Class", "gold"), ("X-Lectern-TTFT-Ms", "soon")):
                answer = client.post(
                    "/v1/chat/completions", json={**ASK, "stream": stream}, headers={name: value}
                )
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == name
    assert len(server_once.engine.calls) == before
