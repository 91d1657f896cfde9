"""Login, sessions, passwords, back-off, users."""

import contextlib
import time
from collections import Counter

import httpx2
import pytest
from sqlalchemy import select

from backend.accounts import backoff
from backend.accounts.backoff import wait_seconds
from backend.accounts.models import LoginSession, User
from backend.accounts.passwords import Passwords, check_strength, one_time_password
from backend.database import Database
from backend.errors import ApiError
from tests.backend.world import PASSWORD, World


def login(client: httpx2.Client, username: str, password: str = PASSWORD) -> httpx2.Response:
    return client.post("/api/auth/login", json={"username": username, "password": password})


def test_login_gives_a_token_that_is_not_stored(world: World) -> None:
    answer = login(world.client(), "student")
    assert answer.status_code == 200
    token = answer.json()["token"]
    with world.database.read() as session:
        stored = [row.token_hash for row in session.execute(select(LoginSession)).scalars()]
    assert stored
    assert token not in stored
    me = httpx2.get(world.url + "/api/me", headers={"cookie": f"lectern_session={token}"}).json()
    assert me["user"]["username"] == "student"
    assert [course["slug"] for course in me["courses"]] == ["one"]
    assert me["model"] == {"id": "demo", "untrained": True, "available": True}


def test_every_login_makes_another_token(world: World) -> None:
    first, second = (login(world.client(), "student").json()["token"] for _ in range(2))
    assert first != second


def test_wrong_unknown_and_deactivated_look_alike(world: World) -> None:
    with world.database.write() as session:
        user = session.get(User, world.users["stranger"].id)
        assert user is not None
        user.active = False
    client = world.client()
    answers = [
        login(client, "student", "wrong password"),
        login(client, "nobody", "wrong password"),
        login(client, "stranger"),
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1


def test_an_unknown_name_costs_a_hash_too() -> None:
    passwords = Passwords(memory_kib=8192, rounds=4)
    stored = passwords.hash("a password of mine")

    def cost(hashed: str | None) -> float:
        began = time.process_time()
        for _ in range(5):
            assert not passwords.verify(hashed, "another one")
        return time.process_time() - began

    # Without the dummy hash the second would be thousands of times cheaper.
    assert cost(None) > cost(stored) / 10


def test_logout_ends_this_session_only(world: World) -> None:
    one, two = world.client("student"), world.client("student")
    assert one.post("/api/auth/logout").status_code == 204
    assert one.get("/api/me").status_code == 401
    assert two.get("/api/me").status_code == 200


def test_change_of_password_ends_all_other_sessions(world: World) -> None:
    one, two = world.client("student"), world.client("student")
    body = {"current_password": PASSWORD, "new_password": "another good one"}
    answer = one.post("/api/auth/password", json=body)
    assert answer.status_code == 200
    assert two.get("/api/me").status_code == 401
    assert one.get("/api/me").status_code == 401  # the token is rotated too
    fresh = {"cookie": f"lectern_session={answer.json()['token']}"}
    assert httpx2.get(world.url + "/api/me", headers=fresh).status_code == 200
    assert login(world.client(), "student").status_code == 401
    assert login(world.client(), "student", "another good one").status_code == 200


@pytest.mark.parametrize("new", ["short", PASSWORD, "student1", "aaaaaaaaaaaa", "x" * 300])
def test_bad_new_passwords_are_refused(world: World, new: str) -> None:
    body = {"current_password": PASSWORD, "new_password": new}
    answer = world.client("student").post("/api/auth/password", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "new_password"
    assert new not in answer.text


def test_one_time_password_must_be_changed_before_anything_else(world: World) -> None:
    admin = world.client("admin")
    made = admin.post("/api/users", json={"username": "new.student", "role": "student"}).json()
    token = login(world.client(), "new.student", made["one_time_password"]).json()["token"]
    client = httpx2.Client(base_url=world.url, cookies={"lectern_session": token})
    assert client.get("/api/me").json()["user"]["must_change_password"] is True
    for path in ("/api/courses", "/api/keys", "/api/usage"):
        refused = client.get(path)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "password_change_required"
    body = {"current_password": made["one_time_password"], "new_password": "my very own one"}
    token = client.post("/api/auth/password", json=body).json()["token"]
    client = httpx2.Client(base_url=world.url, cookies={"lectern_session": token})
    assert client.get("/api/courses").status_code == 200


def test_reset_by_an_administrator(world: World) -> None:
    student = world.client("student")
    path = f"/api/users/{world.users['student'].id}/reset"
    password = world.client("admin").post(path).json()["one_time_password"]
    assert student.get("/api/me").status_code == 401
    assert login(world.client(), "student").status_code == 401
    assert login(world.client(), "student", password).json()["user"]["must_change_password"]


def test_deactivated_user_loses_sessions_and_keys(world: World) -> None:
    student, key = world.client("student"), world.key("student")
    bearer = {"authorization": f"Bearer {key}"}
    assert httpx2.get(world.url + "/v1/models", headers=bearer).status_code == 200
    path = f"/api/users/{world.users['student'].id}"
    assert world.client("admin").patch(path, json={"active": False}).json()["active"] is False
    assert student.get("/api/me").status_code == 401
    assert httpx2.get(world.url + "/v1/models", headers=bearer).status_code == 401
    # Coming back does not bring old keys back.
    world.client("admin").patch(path, json={"active": True})
    assert httpx2.get(world.url + "/v1/models", headers=bearer).status_code == 401


def test_the_last_administrator_stays(world: World) -> None:
    path = f"/api/users/{world.users['admin'].id}"
    for change in ({"active": False}, {"role": "teacher"}):
        assert world.client("admin").patch(path, json=change).status_code == 409


def test_taken_user_name(world: World) -> None:
    body = {"username": "STUDENT", "role": "student"}
    answer = world.client("admin").post("/api/users", json=body)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "username_taken"


def test_expired_sessions_are_refused(world: World) -> None:
    client = world.client("student")
    with world.database.write() as session:
        for row in session.execute(select(LoginSession)).scalars():
            row.expires_at = row.created_at
    assert client.get("/api/me").status_code == 401


def test_posts_from_pages_of_other_sites_are_refused(world: World) -> None:
    client = world.client("student")
    body = {"name": "x"}
    foreign = client.post("/api/keys", json=body, headers={"origin": "http://127.0.0.1:9999"})
    assert foreign.status_code == 403
    own = client.post("/api/keys", json=body, headers={"origin": world.url})
    assert own.status_code == 201


def test_failed_logins_back_off_for_known_and_unknown_alike(world: World) -> None:
    client = world.client()
    for name in ("student", "nobody"):
        codes = [login(client, name, "wrong password").status_code for _ in range(6)]
        assert codes == [401] * 6
        blocked = login(client, name)  # for the known name this would be right
        assert blocked.status_code == 429
        assert blocked.json()["error"]["code"] == "too_many_logins"
        assert int(blocked.headers["retry-after"]) >= 1


def test_address_comes_from_forwarded_header_of_the_web_server(world: World) -> None:
    client = world.client()
    for number in range(60):
        answer = client.post(
            "/api/auth/login",
            json={"username": f"guess{number}", "password": "wrong password"},
            headers={"x-forwarded-for": "203.0.113.9"},
        )
    assert answer.status_code == 429
    assert login(client, "student").status_code == 200  # another address


def test_wait_doubles_up_to_its_bound() -> None:
    assert [wait_seconds(n) for n in range(4, 9)] == [0, 0, 1, 2, 4]
    assert wait_seconds(50) == wait_seconds(1000) == 900


def _fail(database: Database, times: int, address: str) -> None:
    for _ in range(times):
        with contextlib.suppress(ApiError):
            backoff.begin_attempt(database, "student", address)


def test_nobody_can_lock_another_person_out_for_long(database: Database) -> None:
    _fail(database, 30, "203.0.113.66")
    backoff.begin_attempt(database, "student", "203.0.113.1")  # the student's own address


def test_guesses_from_many_addresses_are_slowed_down(database: Database) -> None:
    for number in range(9):
        _fail(database, 3, f"203.0.113.{number}")
    with pytest.raises(ApiError) as caught:
        backoff.begin_attempt(database, "student", "203.0.113.99")
    assert int(caught.value.headers["Retry-After"]) <= 30


def test_a_reset_ends_the_wait(world: World) -> None:
    client = world.client()
    for _ in range(7):
        answer = login(client, "student", "wrong password")
    assert answer.status_code == 429
    path = f"/api/users/{world.users['student'].id}/reset"
    password = world.client("admin").post(path).json()["one_time_password"]
    assert login(client, "student", password).status_code == 200


def test_weak_new_passwords_are_no_guesses(world: World) -> None:
    client = world.client("student")
    for new in ("short", PASSWORD):
        for _ in range(8):
            body = {"current_password": PASSWORD, "new_password": new}
            assert client.post("/api/auth/password", json=body).status_code == 400
    body = {"current_password": PASSWORD, "new_password": "another horse battery"}
    assert client.post("/api/auth/password", json=body).status_code == 200


def test_attempts_at_the_same_moment_are_all_counted(database: Database) -> None:
    """On both databases: no more than the free attempts and one get through."""
    from concurrent.futures import ThreadPoolExecutor

    def attempt(_: int) -> str:
        try:
            backoff.begin_attempt(database, "student", "203.0.113.1")
        except ApiError as error:
            return error.code
        return "through"

    with ThreadPoolExecutor(16) as pool:
        outcomes = Counter(pool.map(attempt, range(32)))
    assert outcomes["through"] == 6
    assert outcomes["too_many_logins"] == 26


def test_right_password_forgives_the_account(database: Database) -> None:
    for _ in range(5):
        backoff.begin_attempt(database, "student", "203.0.113.1")
    with database.write() as session:
        backoff.forgive(session, "student", "203.0.113.1")
    for _ in range(6):
        backoff.begin_attempt(database, "student", "203.0.113.2")
    with pytest.raises(ApiError):
        backoff.begin_attempt(database, "student", "203.0.113.2")


def test_one_time_passwords_are_good_passwords() -> None:
    made = {one_time_password() for _ in range(50)}
    assert len(made) == 50
    for password in made:
        check_strength(password, "student")


def test_password_hash_is_renewed_when_its_cost_changed(world: World) -> None:
    with world.database.write() as session:
        user = session.get(User, world.users["student"].id)
        assert user is not None
        user.password_hash = old = Passwords(memory_kib=512, rounds=1).hash(PASSWORD)
    assert login(world.client(), "student").status_code == 200
    with world.database.read() as session:
        user = session.get(User, world.users["student"].id)
        assert user is not None
        assert user.password_hash != old
    assert login(world.client(), "student").status_code == 200
