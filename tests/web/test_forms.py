"""Sign-in, sign-out, change of password and language: cookies, form tokens, redirects."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from tests.web.fake_backend import FakeBackend
from tests.web.serving_pages import running_backend
from web.client import Api, make_pool
from web.forms import FormPages
from web.security import Gate, SecurityHeaders, SessionIdentity, identity, safe_next


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def pages(backend: FakeBackend) -> Iterator[Starlette]:
    async def page(_: object) -> PlainTextResponse:
        return PlainTextResponse("the page")

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(websocket.headers.getlist("x-lectern-identity"))
        await websocket.close()

    pool = make_pool()
    with running_backend(backend) as url:

        def api(request: HTTPConnection, token: str | None) -> Api:
            return Api(pool, url, lambda: token)

        yield Starlette(
            routes=[
                *FormPages(api).routes(),
                WebSocketRoute("/_stcore/stream", socket),
                Route("/{path:path}", page, methods=["GET", "PUT", "DELETE"]),
            ],
            middleware=[
                Middleware(SecurityHeaders),
                Middleware(SessionIdentity),
                Middleware(Gate, api=api),
            ],
        )


@pytest.fixture
def client(pages: Starlette) -> TestClient:
    return TestClient(pages, follow_redirects=False, headers={"accept": "text/html"})


def _token(html: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', html)
    assert found is not None
    return found[1]


def _login(client: TestClient, name: str = "student", target: str = "/", **more: str):  # type: ignore[no-untyped-def]
    csrf = _token(client.get("/login").text)
    form = {"csrf": csrf, "username": name, "password": f"{name}-password", "next": target, **more}
    return client.post("/login", data=form)


def _cookie(response, name: str) -> str:  # type: ignore[no-untyped-def]
    (found,) = [c for c in response.headers.get_list("set-cookie") if c.startswith(f"{name}=")]
    return str(found)


def test_login_sets_the_cookie_and_redirects_with_303(client: TestClient) -> None:
    response = _login(client, target="/search?course=1")
    assert response.status_code == 303
    assert response.headers["location"] == "/search?course=1"
    cookie = _cookie(response, "lectern_session")
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Path=/" in cookie
    assert "Secure" not in cookie
    assert response.headers["cache-control"] == "no-store"


def test_the_cookie_is_secure_under_https(pages: Starlette) -> None:
    client = TestClient(pages, base_url="https://testserver", follow_redirects=False)
    response = _login(client)
    assert "Secure" in _cookie(response, "lectern_session")
    assert "Secure" in _cookie(response, "lectern_csrf")


def test_login_makes_a_new_session_and_ends_the_one_before(
    client: TestClient, backend: FakeBackend
) -> None:
    _login(client)
    first, first_csrf = client.cookies["lectern_session"], client.cookies["lectern_csrf"]
    _login(client, "other")
    second = client.cookies["lectern_session"]
    assert first != second
    assert client.cookies["lectern_csrf"] != first_csrf
    assert first not in backend.sessions
    assert backend.sessions[second] == 4


def test_a_planted_session_cookie_is_replaced(client: TestClient) -> None:
    client.cookies.set("lectern_session", "chosen-by-somebody", domain="testserver.local")
    _login(client)
    assert client.cookies["lectern_session"] != "chosen-by-somebody"


@pytest.mark.parametrize("csrf", ["", "wrong", "x" * 43])
def test_a_form_without_the_token_is_refused(
    client: TestClient, backend: FakeBackend, csrf: str
) -> None:
    client.get("/login")
    form = {"csrf": csrf, "username": "student", "password": "student-password"}
    response = client.post("/login", data=form)
    assert response.status_code == 403
    assert "lectern_session" not in response.headers.get("set-cookie", "")
    assert backend.sessions == {}


def test_a_form_token_without_its_cookie_is_refused(client: TestClient) -> None:
    csrf = _token(client.get("/login").text)
    client.cookies.clear()
    form = {"csrf": csrf, "username": "student", "password": "student-password"}
    assert client.post("/login", data=form).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "null"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, 303),
        ({"origin": "http://testserver"}, 303),
    ],
)
def test_forms_of_other_sites_are_refused(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    csrf = _token(client.get("/login").text)
    form = {"csrf": csrf, "username": "student", "password": "student-password"}
    assert client.post("/login", data=form, headers=headers).status_code == status


def test_a_large_form_is_not_read(client: TestClient) -> None:
    csrf = _token(client.get("/login").text)
    form = {"csrf": csrf, "username": "student", "password": "p" * 20_000}
    assert client.post("/login", data=form).status_code == 403


def test_wrong_and_unknown_look_alike_and_nothing_is_echoed(client: TestClient) -> None:
    pages = []
    for name in ("student", "nobody"):
        csrf = _token(client.get("/login").text)
        form = {"csrf": csrf, "username": name, "password": "guess-123"}
        response = client.post("/login", data=form)
        assert response.status_code == 401
        assert "guess-123" not in response.text
        pages.append(response.text.replace(name, "NAME"))
    assert pages[0] == pages[1]


def test_back_off_is_told_with_its_seconds(client: TestClient, backend: FakeBackend) -> None:
    backend.failures = 5
    response = _login(client)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "17"
    assert "17 seconds" in response.text


def test_names_are_escaped(client: TestClient) -> None:
    csrf = _token(client.get("/login").text)
    form = {"csrf": csrf, "username": '"><script>alert(1)</script>', "password": "x"}
    assert "<script>" not in client.post("/login", data=form).text


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/%2f/evil.example",
        "/chat/../../evil",
        "javascript:alert(1)",
        "/chat?next=//evil.example",
        "/login",
        "/chat\r\nset-cookie: a=b",
        "/chat#x",
        "",
    ],
)
def test_redirects_stay_on_our_pages(client: TestClient, target: str) -> None:
    assert safe_next(target) == "/"
    assert _login(client, target=target).headers["location"] == "/"
    response = client.get("/language", params={"to": "zh", "next": target})
    assert response.headers["location"] in {"/", "/login"}


def test_the_gate_sends_strangers_to_the_form_and_remembers_the_page(client: TestClient) -> None:
    assert client.get("/").headers["location"] == "/login"
    response = client.get("/chat?course=1&conversation=17")
    assert response.status_code == 303
    assert response.headers["location"] == "/login?next=%2Fchat%3Fcourse%3D1%26conversation%3D17"
    form = client.get(response.headers["location"]).text
    assert 'name="next" value="/chat?course=1&amp;conversation=17"' in form
    client.cookies.set("lectern_session", "expired", domain="testserver.local")
    assert client.get("/").headers["location"] == "/login"
    _login(client)
    assert client.get("/").text == "the page"


def test_a_one_time_password_must_be_changed_first(
    client: TestClient, backend: FakeBackend
) -> None:
    csrf = _token(client.get("/login").text)
    form = {"csrf": csrf, "username": "fresh", "password": "one-time-password", "next": "/search"}
    response = client.post("/login", data=form)
    assert response.headers["location"] == "/password"
    assert client.get("/").headers["location"] == "/password"
    before = client.cookies["lectern_session"]
    page = client.get("/password").text
    form = {"csrf": _token(page), "forced": "yes", "current": "one-time-password"}
    differ = client.post("/password", data={**form, "new": "my own words", "again": "other words"})
    assert differ.status_code == 400
    assert "not the same" in differ.text
    short = client.post("/password", data={**form, "new": "short", "again": "short"})
    assert (short.status_code, "at least 10" in short.text) == (400, True)
    wrong = {**form, "current": "guess", "new": "my own words", "again": "my own words"}
    assert client.post("/password", data=wrong).status_code == 401
    done = client.post("/password", data={**form, "new": "my own words", "again": "my own words"})
    assert done.status_code == 303
    assert client.cookies["lectern_session"] != before
    assert before not in backend.sessions
    assert client.get("/").text == "the page"


def test_logout_ends_the_session_in_the_backend(client: TestClient, backend: FakeBackend) -> None:
    _login(client)
    token = client.cookies["lectern_session"]
    stale = client.post("/logout", data={"csrf": "stale"})
    assert stale.status_code == 403
    assert token in backend.sessions
    response = client.post("/logout", data={"csrf": _token(stale.text)})
    assert response.status_code == 303
    assert response.headers["location"] == "/login"
    assert token not in backend.sessions
    assert "lectern_session" not in client.cookies


def test_logout_by_get_only_asks(client: TestClient, backend: FakeBackend) -> None:
    _login(client)
    assert client.get("/logout").status_code == 200
    assert client.cookies["lectern_session"] in backend.sessions


def test_a_backend_that_is_away_is_said_in_a_sentence(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.down = True
    response = _login(client)
    assert response.status_code == 503
    assert "The backend is away." in response.text


def test_the_language_is_chosen_and_kept(client: TestClient) -> None:
    assert "Sign in" in client.get("/login").text
    chinese = client.get("/login", headers={"accept-language": "zh-CN,zh;q=0.9"}).text
    assert "登录" in chinese
    assert '<html lang="zh">' in chinese
    response = client.get("/language?to=zh&next=/login")
    assert response.headers["location"] == "/login"
    assert "登录" in client.get("/login", headers={"accept-language": "en"}).text
    assert client.get("/language?to=xx").headers.get("set-cookie") is None


def test_every_response_carries_the_security_headers(client: TestClient) -> None:
    for path in ("/login", "/assets/forms.css", "/static/x.js"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    form = client.get("/login").headers["content-security-policy"]
    assert "unsafe" not in form
    assert "script-src" not in form
    page = client.get("/static/x.js").headers["content-security-policy"]
    assert "http" not in page
    assert "img-src 'self' data: blob:" in page
    assert "'unsafe-eval'" not in page
    assert "script-src 'self' blob: 'sha256-" in page


def test_a_connection_carries_its_own_identity_whatever_it_claims(client: TestClient) -> None:
    claimed = {"x-lectern-identity": "somebody-else"}
    with client.websocket_connect("/_stcore/stream", headers=claimed) as socket:
        assert socket.receive_json() == ["nobody"]
    client.cookies.set("lectern_session", "token-1", domain="testserver.local")
    with client.websocket_connect("/_stcore/stream", headers=claimed) as socket:
        assert socket.receive_json() == [identity("token-1")]
    assert "token-1" not in identity("token-1")


def test_only_named_assets_are_served(client: TestClient) -> None:
    assert client.get("/assets/mark.svg").headers["content-type"].startswith("image/svg+xml")
    assert client.get("/assets/account.js").status_code == 404
    assert client.get("/assets/..%2fclient.py").status_code in {200, 404}
    assert "ApiError" not in client.get("/assets/..%2fclient.py").text


def test_strangers_cannot_put_files_into_memory(client: TestClient) -> None:
    path = "/_stcore/upload_file/session/file"
    assert client.put(path, content=b"x").status_code == 404
    client.cookies.set("lectern_session", "made-up", domain="testserver.local")
    assert client.put(path, content=b"x").status_code == 404
    client.cookies.clear()
    assert _login(client).status_code == 303
    assert client.put(path, content=b"x").text == "the page"
    assert client.get("/_stcore/metrics").status_code == 404
