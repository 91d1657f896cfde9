"""Every route against every role. A route without a row here fails the test."""

from itertools import product

import pytest
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from backend.app import create_app
from backend.settings import Settings
from tests.backend.world import FakeRetrieval, World

PEOPLE = ("nobody", "student", "stranger", "teacher", "other_teacher", "admin")

ALL = frozenset(PEOPLE)
SIGNED_IN = ALL - {"nobody"}
TEACHERS = frozenset({"teacher", "other_teacher", "admin"})
# In the first course: its members; to everybody else the course does not exist.
MEMBERS = frozenset({"student", "teacher", "admin"})
COURSE_TEACHERS = frozenset({"teacher", "admin"})
OWNER = frozenset({"student"})
ADMIN = frozenset({"admin"})
KEY = frozenset[str]()  # a key, never a session

# (method, path) -> who may; anybody else gets what `refusal` says
RULES: dict[tuple[str, str], frozenset[str]] = {
    ("POST", "/api/auth/login"): ALL,
    ("POST", "/api/auth/logout"): SIGNED_IN,
    ("POST", "/api/auth/password"): SIGNED_IN,
    ("GET", "/api/me"): SIGNED_IN,
    ("GET", "/api/users"): ADMIN,
    ("POST", "/api/users"): ADMIN,
    ("POST", "/api/users/{user_id}/reset"): ADMIN,
    ("PATCH", "/api/users/{user_id}"): ADMIN,
    ("GET", "/api/courses"): SIGNED_IN,
    ("POST", "/api/courses"): TEACHERS,
    ("GET", "/api/courses/{course_id}/members"): COURSE_TEACHERS,
    ("POST", "/api/courses/{course_id}/members"): COURSE_TEACHERS,
    ("DELETE", "/api/courses/{course_id}/members/{user_id}"): COURSE_TEACHERS,
    ("GET", "/api/courses/{course_id}/documents"): MEMBERS,
    ("POST", "/api/courses/{course_id}/documents"): COURSE_TEACHERS,
    ("GET", "/api/courses/{course_id}/documents/{document_id}"): MEMBERS,
    ("DELETE", "/api/courses/{course_id}/documents/{document_id}"): COURSE_TEACHERS,
    ("GET", "/api/courses/{course_id}/documents/{document_id}/text"): MEMBERS,
    ("POST", "/api/courses/{course_id}/documents/{document_id}/retry"): COURSE_TEACHERS,
    ("GET", "/api/courses/{course_id}/search"): MEMBERS,
    ("GET", "/api/courses/{course_id}/passages/{passage_id}"): MEMBERS,
    ("GET", "/api/courses/{course_id}/conversations"): MEMBERS,
    ("POST", "/api/courses/{course_id}/conversations"): MEMBERS,
    ("GET", "/api/conversations/{conversation_id}"): OWNER,
    ("PATCH", "/api/conversations/{conversation_id}"): OWNER,
    ("DELETE", "/api/conversations/{conversation_id}"): OWNER,
    ("POST", "/api/conversations/{conversation_id}/messages"): OWNER,
    ("GET", "/api/conversations/{conversation_id}/stream"): OWNER,
    ("POST", "/api/conversations/{conversation_id}/stop"): OWNER,
    ("GET", "/api/keys"): SIGNED_IN,
    ("POST", "/api/keys"): SIGNED_IN,
    ("PATCH", "/api/keys/{key_id}"): TEACHERS,
    ("DELETE", "/api/keys/{key_id}"): SIGNED_IN,
    ("GET", "/api/users/{user_id}/keys"): ADMIN,
    ("GET", "/api/usage"): SIGNED_IN,
    ("GET", "/api/admin/overview"): ADMIN,
    ("GET", "/health"): ALL,
    ("GET", "/metrics"): ALL,  # loopback only; see test_admin
    ("GET", "/v1/models"): KEY,
    ("GET", "/v1/models/{model_id}"): KEY,
    ("POST", "/v1/chat/completions"): KEY,
    ("POST", "/v1/completions"): KEY,
    ("POST", "/v1/embeddings"): KEY,
    ("POST", "/v1/rerank"): KEY,
    **{(m, "/v1/{path}"): KEY for m in ("GET", "POST", "PUT", "PATCH", "DELETE")},
}
OPEN_UNTIL_CHANGED = {"/api/me", "/api/auth/logout", "/api/auth/password"}


def routes(app: FastAPI) -> set[tuple[str, str]]:
    schema = get_openapi(title="x", version="1", routes=app.routes)
    return {(m.upper(), path) for path, methods in schema["paths"].items() for m in methods}


@pytest.fixture
def app(tmp_path: object) -> FastAPI:
    return create_app(Settings(home=tmp_path), FakeRetrieval())


def test_every_route_has_a_rule(app: FastAPI) -> None:
    assert routes(app) == set(RULES)


def body_for(method: str, path: str) -> dict[str, object]:
    if path.endswith("/documents") and method == "POST":
        return {"files": {"file": ("a.txt", b"text")}}
    bodies: dict[str, dict[str, object]] = {
        "/api/users": {"username": "fresh", "role": "student"},
        "/api/users/{user_id}": {"display_name": "New Name"},
        "/api/courses": {"slug": "fresh", "name": "Fresh"},
        "/api/courses/{course_id}/members": {"username": "bystander"},
        "/api/courses/{course_id}/conversations": {},
        "/api/conversations/{conversation_id}": {"title": "New"},
        "/api/conversations/{conversation_id}/messages": {"content": "What?"},
        "/api/keys": {"name": "x"},
        "/api/keys/{key_id}": {"service_class": "batch"},
        "/api/auth/login": {"username": "student", "password": "wrong"},
        "/api/auth/password": {"current_password": "wrong", "new_password": "long enough"},
    }
    return {"json": bodies.get(path, {})} if method != "GET" else {}


def refusals(path: str, person: str) -> set[int]:
    if person == "nobody" or path.startswith("/v1/"):
        return {401}
    if "{course_id}" in path:
        return {404} if person not in MEMBERS else {403}
    if "{conversation_id}" in path:
        return {404}
    return {403}


@pytest.fixture
def filled(world: World) -> tuple[World, dict[str, object]]:
    """A course with a document, and a conversation of the student."""
    assert world.upload("notes.txt", b"A basic block has one entry.\n").status_code == 202
    world.work()
    student = world.client("student")
    base = f"/api/courses/{world.course.id}"
    passage = student.get(f"{base}/search", params={"q": "basic block"}).json()["passages"][0]
    conversation = student.post(f"{base}/conversations", json={}).json()
    student.post(f"/api/conversations/{conversation['id']}/messages", json={"content": "basic"})
    ids = {
        "course_id": world.course.id,
        "document_id": passage["document_id"],
        "passage_id": passage["id"],
        "conversation_id": conversation["id"],
        "user_id": world.users["bystander"].id,
        "key_id": 999_999,
        "model_id": "demo",
        "path": "nothing",
    }
    return world, ids


def test_every_route_with_every_role(filled: tuple[World, dict[str, object]]) -> None:
    world, ids = filled
    clients = {name: world.client(None if name == "nobody" else name) for name in PEOPLE}
    # Refusals first: what is allowed may delete what the others would ask for.
    for (method, path), person in product(RULES, PEOPLE):
        if person in RULES[method, path]:
            continue
        query = {"q": "x"} if path.endswith("/search") else {}
        answer = clients[person].request(
            method, path.format(**ids), params=query, **body_for(method, path)
        )
        where = (method, path, person, answer.text)
        assert answer.status_code in refusals(path, person), where
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, where
    order = sorted(RULES, key=lambda rule: (rule[0] == "DELETE", rule[1] == "/api/auth/logout"))
    for method, path in order:
        for person in sorted(RULES[method, path]):
            if path == "/api/auth/logout":
                continue
            query = {"q": "x"} if path.endswith("/search") else {}
            answer = clients[person].request(
                method, path.format(**ids), params=query, **body_for(method, path)
            )
            expected_unauthorised = path == "/api/auth/login"  # the password is wrong on purpose
            where = (method, path, person, answer.status_code, answer.text)
            assert answer.status_code not in (403, 405, 422, 500), where
            assert expected_unauthorised or answer.status_code != 401, where


def test_one_time_passwords_open_nothing_else(world: World, app: FastAPI) -> None:
    with world.database.write() as session:
        for user in world.users.values():
            changed = session.get(type(user), user.id)
            assert changed is not None
            changed.must_change_password = True
    admin = world.client("admin")
    ids = dict.fromkeys(
        ("course_id", "document_id", "passage_id", "conversation_id", "user_id", "key_id"), 1
    )
    for method, path in RULES:
        if not path.startswith("/api/") or path in OPEN_UNTIL_CHANGED | {"/api/auth/login"}:
            continue
        query = {"q": "x"} if path.endswith("/search") else {}
        answer = admin.request(method, path.format(**ids), params=query, **body_for(method, path))
        assert answer.status_code == 403, (method, path)
        assert answer.json()["error"]["code"] == "password_change_required"


def test_ids_of_another_course_are_not_found(filled: tuple[World, dict[str, object]]) -> None:
    """A member of course two asks for objects of course one under course two's own address."""
    world, ids = filled
    other = {**ids, "course_id": world.other_course.id}
    for method, path in RULES:
        inner = ("{document_id}", "{passage_id}")
        if not any(name in path for name in inner):
            continue
        answer = world.client("other_teacher").request(
            method, path.format(**other), **body_for(method, path)
        )
        assert answer.status_code == 404, (method, path)
    found = world.client("stranger").get(
        f"/api/courses/{world.other_course.id}/search", params={"q": "basic block"}
    )
    assert found.json() == {"passages": []}


def test_conversations_of_others_are_not_found_even_in_the_same_course(
    filled: tuple[World, dict[str, object]],
) -> None:
    world, ids = filled
    for name in ("teacher", "admin"):
        path = f"/api/conversations/{ids['conversation_id']}"
        assert world.client(name).get(path).status_code == 404


def test_removed_member_loses_course_and_conversations(
    filled: tuple[World, dict[str, object]],
) -> None:
    world, ids = filled
    student = world.client("student")
    path = f"/api/courses/{world.course.id}/members/{world.users['student'].id}"
    assert world.client("teacher").delete(path).status_code == 204
    assert student.get(f"/api/courses/{world.course.id}/documents").status_code == 404
    assert student.get(f"/api/conversations/{ids['conversation_id']}").status_code == 404


def test_students_accounts_never_teach(world: World) -> None:
    path = f"/api/courses/{world.course.id}/members"
    body = {"username": "student", "role": "teacher"}
    assert world.client("teacher").post(path, json=body).status_code == 400
    # A teacher's account that becomes a student's loses the right with it.
    change = {"role": "student"}
    world.client("admin").patch(f"/api/users/{world.users['teacher'].id}", json=change)
    assert world.client("teacher").get(path).status_code == 403


def test_errors_have_one_shape(world: World) -> None:
    client = world.client("admin")
    answers = [
        client.get("/nothing"),
        client.delete("/api/me"),
        client.post("/api/keys", json={"name": ""}),
        client.post("/api/keys", content=b"{", headers={"content-type": "application/json"}),
        client.get("/api/courses/not-a-number/documents"),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]
    assert answers[2].json()["error"]["param"] == "name"


def test_numbers_no_row_can_have_are_not_found(world: World) -> None:
    client = world.client("admin")
    for number in (10**30, 2**63, 2**31, 0, -1):
        for path in (
            f"/api/courses/{number}/documents",
            f"/api/courses/{world.course.id}/documents/{number}",
            f"/api/courses/{world.course.id}/passages/{number}",
            f"/api/conversations/{number}",
        ):
            assert client.get(path).status_code == 404, path
        assert client.delete(f"/api/keys/{number}").status_code == 404
        assert client.post(f"/api/users/{number}/reset").status_code == 404
        members = f"/api/courses/{world.course.id}/members/{number}"
        assert client.delete(members).status_code == 404


def test_a_body_that_is_no_json_is_named_so(world: World) -> None:
    headers = {"content-type": "application/json"}
    answer = world.client().post("/api/auth/login", content=b'{"username":', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert answer.json()["error"]["param"] is None


def test_metrics_are_for_neighbours_alone(world: World) -> None:
    client = world.client()
    assert client.get("/metrics").status_code == 200
    proxied = client.get("/metrics", headers={"x-forwarded-for": "203.0.113.5"})
    assert proxied.status_code == 404


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("172.18.0.4", False),
        ("testclient", False),
    ],
)
def test_who_is_trusted(host: str, trusted: bool) -> None:
    assert Settings().trusts(host) is trusted
    assert Settings(trusted_networks="172.16.0.0/12").trusts("172.18.0.4")
