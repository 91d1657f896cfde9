"""The client of the backend: events, errors, and that nothing of one person reaches another."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest

from web.client import (
    Api,
    ApiError,
    BackendUnreachable,
    PasswordChangeRequired,
    SignedOut,
    make_pool,
)
from web.sse import Event, parse_events
from web.stream import AnswerReader


def test_events_are_parsed_from_lines() -> None:
    lines = [
        ": ping",
        "event: passages",
        'data: {"message_id": 4,',
        'data: "passages": []}',
        "",
        "id: 7",
        "event:delta",
        'data:{"text": "量:: a"}',
        "",
        'data: {"text": "cut',
    ]
    assert list(parse_events(lines)) == [
        Event("ping", {}),
        Event("passages", {"message_id": 4, "passages": []}),
        Event("delta", {"text": "量:: a"}),
    ]


def test_an_event_that_is_no_object_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON object"):
        list(parse_events(["data: [1]", ""]))


def _api(handler: Callable[[httpx2.Request], httpx2.Response], token: str | None = "t") -> Api:
    pool = httpx2.Client(transport=httpx2.MockTransport(handler))
    return Api(pool, "http://backend", lambda: token, client_host="10.0.0.9")


def _refusal(status: int, code: str, **headers: str) -> httpx2.Response:
    body = {"error": {"message": "A sentence.", "type": "x", "param": None, "code": code}}
    return httpx2.Response(status, json=body, headers=headers)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "not_signed_in", SignedOut),
        (403, "password_change_required", PasswordChangeRequired),
        (404, "not_found", ApiError),
        (401, "invalid_credentials", ApiError),
    ],
)
def test_refusals_have_their_kind(status: int, code: str, kind: type[ApiError]) -> None:
    with pytest.raises(ApiError) as caught:
        _api(lambda _: _refusal(status, code)).me()
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.message == "A sentence."


def test_the_wait_of_a_refused_login_is_known() -> None:
    with pytest.raises(ApiError) as caught:
        _api(lambda _: _refusal(429, "too_many", **{"retry-after": "17"}), None).login("a", "b")
    assert caught.value.retry_after == 17


def test_an_answer_that_is_no_json_still_gives_a_sentence() -> None:
    with pytest.raises(ApiError, match="status 502"):
        _api(lambda _: httpx2.Response(502, text="<html>bad gateway</html>")).me()


def test_no_backend_is_its_own_error() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused", request=request)

    with pytest.raises(BackendUnreachable):
        _api(refuse).me()
    with pytest.raises(BackendUnreachable), _api(refuse).attach(3):
        pass


def test_the_token_goes_into_the_cookie_header_alone() -> None:
    seen: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json={})

    _api(answer, "secret-token").search("1", "left recursion")
    (request,) = seen
    assert request.headers["cookie"] == "lectern_session=secret-token"
    assert request.headers["x-forwarded-for"] == "10.0.0.9"
    assert "secret-token" not in str(request.url)


def test_the_shared_pool_keeps_no_cookies() -> None:
    pool = make_pool()
    assert pool.cookies.jar is not None
    response = httpx2.Response(
        200,
        headers={"set-cookie": "lectern_session=planted; Path=/"},
        request=httpx2.Request("GET", "http://backend/api/me"),
    )
    pool.cookies.extract_cookies(response)
    assert len(pool.cookies) == 0


@pytest.mark.parametrize("value", ["../users", "1/../2", "", "1?x=1", "a b", "1\n"])
def test_ids_from_the_address_bar_cannot_change_the_path(value: str) -> None:
    def unexpected(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError(f"asked for {request.url}")

    with pytest.raises(ApiError) as caught:
        _api(unexpected).conversation(value)
    assert caught.value.status == 404


def test_a_stream_is_read_in_batches_and_its_refusal_is_raised() -> None:
    body = 'event: delta\ndata: {"text": "a"}\n\nevent: done\ndata: {}\n\n'
    api = _api(lambda _: httpx2.Response(200, text=body))
    with AnswerReader(api.ask(5, "why?")) as reader:
        events = [event.name for batch in reader.batches(5) for event in batch]
    assert events == ["delta", "done"]
    refused = _api(lambda _: _refusal(409, "answer_running"))
    with AnswerReader(refused.ask(5, "why?")) as reader, pytest.raises(ApiError) as caught:
        list(reader.batches(5))
    assert caught.value.code == "answer_running"
