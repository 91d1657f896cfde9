"""API keys: form, storage, expiry, revocation."""

import re
import time
from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import select

from backend.database import utcnow
from backend.keys import secret
from backend.keys.models import ApiKey
from backend.settings import Settings
from tests.backend.upstream import FakeUpstream
from tests.backend.world import World


def ask(world: World, key: str) -> httpx2.Response:
    return httpx2.get(world.url + "/v1/models", headers={"authorization": f"Bearer {key}"})


def test_form_of_a_key() -> None:
    made = secret.make()
    assert re.fullmatch(r"sk-[0-9A-Za-z]{54}", made.key)
    assert secret.is_well_formed(made.key)
    assert made.key.startswith(made.prefix)
    assert made.key.endswith(made.last4)
    assert len({secret.make().key for _ in range(100)}) == 100


@pytest.mark.parametrize("place", [3, 20, 50, 56])
def test_a_mistyped_key_is_seen_by_its_checksum(place: int) -> None:
    key = secret.make().key
    wrong = "1" if key[place] != "1" else "2"
    assert not secret.is_well_formed(key[:place] + wrong + key[place + 1 :])


@pytest.mark.parametrize("key", ["", "sk-", "sk-" + "a" * 54, "x" * 57, "sk-" + "é" * 54])
def test_other_strings_are_no_keys(key: str) -> None:
    assert not secret.is_well_formed(key)


def test_key_is_shown_once_and_stored_as_a_hash(world: World) -> None:
    client = world.client("student")
    made = client.post("/api/keys", json={"name": "editor"}).json()
    key = made.pop("key")
    assert client.get("/api/keys").json() == [made]
    with world.database.read() as session:
        row = session.execute(select(ApiKey)).scalar_one()
        stored = {name: str(value) for name, value in vars(row).items()}
    assert all(key not in value and key[11:] not in value for value in stored.values())
    assert ask(world, key).status_code == 200
    assert client.get("/api/keys").json()[0]["last_used_at"] is not None


def test_revoked_expired_and_unknown_look_alike(world: World) -> None:
    client = world.client("student")
    revoked, expired = (client.post("/api/keys", json={"name": "k"}).json() for _ in range(2))
    assert ask(world, revoked["key"]).status_code == 200
    assert client.delete(f"/api/keys/{revoked['id']}").status_code == 204
    with world.database.write() as session:
        row = session.get(ApiKey, expired["id"])
        assert row is not None
        row.expires_at = utcnow() - timedelta(seconds=1)
    answers = [ask(world, key) for key in (revoked["key"], expired["key"], secret.make().key, "x")]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.json()["error"]["code"] for answer in answers} == {"invalid_api_key"}
    assert len({answer.text for answer in answers}) == 1
    assert client.get("/api/keys").json()[1]["revoked"] is True


def test_keys_of_others_cannot_be_revoked(world: World) -> None:
    made = world.client("student").post("/api/keys", json={"name": "k"}).json()
    assert world.client("teacher").delete(f"/api/keys/{made['id']}").status_code == 404
    assert ask(world, made["key"]).status_code == 200


def test_expiry_in_days(world: World) -> None:
    body = {"name": "term", "expires_in_days": 30}
    made = world.client("student").post("/api/keys", json=body).json()
    assert made["expires_at"] > made["created_at"]
    refused = world.client("student").post("/api/keys", json={"name": "k", "expires_in_days": 0})
    assert refused.status_code == 400


def test_number_of_keys_is_bounded(world: World) -> None:
    client = world.client("student")
    codes = [client.post("/api/keys", json={"name": "k"}).status_code for _ in range(51)]
    assert codes == [201] * 50 + [409]


def test_a_key_revoked_by_another_process_is_refused_within_seconds(world: World) -> None:
    key = world.key("student")
    assert ask(world, key).status_code == 200
    with world.database.write() as session:
        session.execute(select(ApiKey)).scalar_one().revoked_at = utcnow()
    end = time.monotonic() + 5
    while ask(world, key).status_code == 200:
        assert time.monotonic() < end


class TestClasses:
    @pytest.fixture
    def more_settings(self) -> dict[str, object]:
        return {"key_classes": "standard, interactive,batch,exam.2027"}

    def test_a_class_reaches_the_engine(self, world: World, fake: FakeUpstream) -> None:
        admin = world.client("admin")
        made = world.client("student").post("/api/keys", json={"name": "k"}).json()
        assert made["service_class"] == "standard"
        call = {"authorization": f"Bearer {made['key']}"}
        for name in ("batch", "interactive", "exam.2027", "standard"):
            change = admin.patch(f"/api/keys/{made['id']}", json={"service_class": name})
            assert change.status_code == 200
            assert change.json()["service_class"] == name
            body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
            url = world.url + "/v1/chat/completions"
            assert httpx2.post(url, json=body, headers=call).status_code == 200
            assert fake.headers[-1]["x-lectern-class"] == name

    def test_who_may_choose_a_class(self, world: World) -> None:
        student, teacher, admin = (world.client(who) for who in ("student", "teacher", "admin"))
        wanted = {"name": "k", "service_class": "interactive"}
        assert student.post("/api/keys", json=wanted).status_code == 403
        assert student.get("/api/keys").json() == []
        own = teacher.post("/api/keys", json=wanted).json()
        assert own["service_class"] == "interactive"
        others = student.post("/api/keys", json={"name": "k"}).json()
        change = {"service_class": "batch"}
        assert student.patch(f"/api/keys/{others['id']}", json=change).status_code == 403
        assert teacher.patch(f"/api/keys/{others['id']}", json=change).status_code == 404
        assert student.get("/api/keys").json()[0]["service_class"] == "standard"
        assert teacher.patch(f"/api/keys/{own['id']}", json=change).status_code == 200
        assert admin.patch(f"/api/keys/{others['id']}", json=change).status_code == 200
        assert student.get("/api/keys").json()[0]["service_class"] == "batch"

    def test_an_administrator_sees_the_keys_of_a_user(self, world: World) -> None:
        made = world.client("student").post("/api/keys", json={"name": "k"}).json()
        key = made.pop("key")
        listed = world.client("admin").get(f"/api/users/{world.users['student'].id}/keys")
        assert listed.json() == [made]
        assert key not in listed.text

    @pytest.mark.parametrize("name", ["gold", "", "Standard", "x" * 33])
    def test_an_unknown_class_is_refused(self, world: World, name: str) -> None:
        admin = world.client("admin")
        made = admin.post("/api/keys", json={"name": "k"}).json()
        for answer in (
            admin.patch(f"/api/keys/{made['id']}", json={"service_class": name}),
            admin.post("/api/keys", json={"name": "k", "service_class": name}),
        ):
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "service_class"
        assert [key["service_class"] for key in admin.get("/api/keys").json()] == ["standard"]


@pytest.mark.parametrize("value", ["", "a,,b", "a b", "x" * 33])
def test_names_of_classes_are_checked_at_the_start(value: str) -> None:
    with pytest.raises(ValueError, match="key_classes"):
        Settings(key_classes=value)
