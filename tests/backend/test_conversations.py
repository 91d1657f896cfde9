"""Questions and answers: events, stop, re-attach, hang-up, death of engine and backend."""

import json
import threading
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from backend.app import create_app
from backend.conversations import service
from backend.conversations.service import title_from
from backend.database import Database
from tests.backend.conftest import settings_for
from tests.backend.upstream import FakeUpstream, serve
from tests.backend.world import FakeRetrieval, World, events, make_world, wait_for

NOTES = b"A basic block has one entry and one exit.\nA live range ends at the last use.\n"


def start(world: World, client: httpx2.Client) -> str:
    path = f"/api/courses/{world.course.id}/conversations"
    return f"/api/conversations/{client.post(path, json={}).json()['id']}"


def ask(client: httpx2.Client, path: str, text: str = "basic block") -> list[tuple[str, dict]]:  # type: ignore[type-arg]
    with client.stream("POST", f"{path}/messages", json={"content": text}) as answer:
        assert answer.status_code == 200, answer.read()
        return events(list(answer.iter_lines()))


@pytest.fixture
def ready(world: World) -> World:
    world.upload("notes.txt", NOTES)
    world.work()
    return world


def last(client: httpx2.Client, path: str) -> dict[str, object]:
    found: dict[str, object] = client.get(path).json()["messages"][-1]
    return found


def test_cited_answer(ready: World, fake: FakeUpstream) -> None:
    client = ready.client("student")
    path = start(ready, client)
    seen = ask(client, path)
    assert seen[0][0] == "passages"
    assert {name for name, _ in seen[1:-1]} == {"delta"}
    passages = seen[0][1]["passages"]
    assert passages[0]["n"] == 1
    assert passages[0]["document"] == "notes.txt"
    assert passages[0]["text"].startswith("A basic block")
    assert seen[0][1]["left_out"] == {"turns": 0, "passages": 0}
    assert "".join(data["text"] for name, data in seen if name == "delta") == "Hello [1] world"
    name, done = seen[-1]
    assert name == "done"
    assert done["finish_reason"] == "stop"
    assert done["citations"] == [1]
    assert done["usage"] == {"prompt_tokens": 7, "completion_tokens": 5}
    stored = client.get(path).json()
    assert stored["title"] == "basic block"
    question, answer = stored["messages"]
    assert (question["role"], question["content"]) == ("user", "basic block")
    assert answer["id"] == done["message_id"]
    assert (answer["content"], answer["state"]) == ("Hello [1] world", "complete")
    assert answer["citations"] == [1]
    assert answer["passages"] == passages
    sent = fake.bodies[-1]
    assert sent["cache_salt"] == ready.course.salt
    assert "A basic block" in sent["messages"][-1]["content"]
    usage = client.get("/api/usage").json()
    assert usage["total"] == {"prompt_tokens": 7, "completion_tokens": 5, "requests": 1}


def test_works_on_both_databases(world_on_both: World) -> None:
    world = world_on_both
    world.upload("notes.txt", NOTES)
    world.work()
    client = world.client("student")
    path = start(world, client)
    for _ in range(2):
        assert ask(client, path)[-1][0] == "done"
    assert len(client.get(path).json()["messages"]) == 4
    listed = client.get(f"/api/courses/{world.course.id}/conversations").json()
    assert [row["title"] for row in listed] == ["basic block"]
    assert client.patch(path, json={"title": "Blocks"}).json()["title"] == "Blocks"
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404


def test_another_servers_model_gets_no_salt(ready: World, fake: FakeUpstream) -> None:
    fake.owned_by = "vllm"
    client = ready.client("student")
    ask(client, start(ready, client))
    assert "cache_salt" not in fake.bodies[-1]


def test_upstream_without_tokenize(ready: World, fake: FakeUpstream) -> None:
    fake.has_tokenize = False
    client = ready.client("student")
    assert ask(client, start(ready, client))[-1][0] == "done"


def test_twenty_turns_never_fail(ready: World, fake: FakeUpstream) -> None:
    fake.words = ["a long answer that fills the context " * 20]
    client = ready.client("student")
    path = start(ready, client)
    for turn in range(20):
        seen = ask(client, path, f"basic block {turn} " + "and so on " * 30)
        assert seen[-1][0] == "done"
    assert seen[0][1]["left_out"]["turns"] > 0
    assert last(client, path)["left_out"] == seen[0][1]["left_out"]


def test_question_longer_than_the_context(ready: World) -> None:
    client = ready.client("student")
    name, data = ask(client, start(ready, client), "x y " * 7_000)[-1]
    assert name == "error"
    assert data["error"]["code"] == "context_length_exceeded"


def test_stop_keeps_the_partial_answer(ready: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = ["word "] * 500, 0.02
    client = ready.client("student")
    path = start(ready, client)
    with client.stream("POST", f"{path}/messages", json={"content": "basic block"}) as answer:
        lines = answer.iter_lines()
        for line in lines:
            if line.startswith("event: delta"):
                break
        assert ready.client("student").post(f"{path}/stop").status_code == 204
        seen = events(["event: delta", *lines])
    assert seen[-1][0] == "done"
    assert seen[-1][1]["finish_reason"] == "stopped"
    stored = last(client, path)
    assert stored["state"] == "stopped"
    assert str(stored["content"]).startswith("word ")
    wait_for(lambda: fake.closed_early == 1)
    assert client.post(f"{path}/stop").status_code == 204  # nothing runs: nothing happens
    fake.delay = 0
    fake.words = ["again"]
    assert ask(client, path)[-1][0] == "done"


def test_one_answer_at_a_time(ready: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = ["word "] * 500, 0.02
    client = ready.client("student")
    path = start(ready, client)
    with client.stream("POST", f"{path}/messages", json={"content": "basic"}) as answer:
        next(answer.iter_lines())
        second = ready.client("student").post(f"{path}/messages", json={"content": "basic"})
        assert second.status_code == 409
        assert second.json()["error"]["code"] == "answer_running"
    assert client.delete(path).status_code == 204
    wait_for(lambda: fake.closed_early == 1)


def test_a_dropped_page_does_not_end_the_answer(ready: World, fake: FakeUpstream) -> None:
    fake.words, fake.delay = [f"w{i} " for i in range(60)], 0.02
    client = ready.client("student")
    path = start(ready, client)
    with client.stream("POST", f"{path}/messages", json={"content": "basic block"}) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: delta"):
                break
    running = last(client, path)
    assert running["state"] == "streaming"
    with ready.client("student").stream("GET", f"{path}/stream") as again:
        seen = events(list(again.iter_lines()))
    assert [name for name, _ in seen[:2]] == ["passages", "delta"]
    text = "".join(data["text"] for name, data in seen if name == "delta")
    assert text == "".join(fake.words)
    assert seen[-1][0] == "done"
    assert fake.closed_early == 0
    assert last(client, path)["content"] == text


def test_attaching_to_an_ended_answer_replays_it(ready: World) -> None:
    client = ready.client("student")
    path = start(ready, client)
    assert client.get(f"{path}/stream").status_code == 404
    first = ask(client, path)
    with client.stream("GET", f"{path}/stream") as answer:
        seen = events(list(answer.iter_lines()))
    assert [name for name, _ in seen] == ["passages", "delta", "done"]
    assert seen[0] == first[0]
    assert seen[1][1]["text"] == "Hello [1] world"
    assert seen[2][1]["citations"] == [1]


@pytest.mark.parametrize(
    ("fault", "code"), [("cut_after", "upstream_cut"), ("error_after", "engine_dead")]
)
def test_engine_death_keeps_the_partial_answer(
    ready: World, fake: FakeUpstream, fault: str, code: str
) -> None:
    setattr(fake, fault, 2)
    client = ready.client("student")
    path = start(ready, client)
    seen = ask(client, path)
    assert seen[-1][0] == "error"
    assert seen[-1][1]["error"]["code"] == code
    stored = last(client, path)
    assert (stored["state"], stored["content"]) == ("failed", "Hello ")
    assert stored["error"] == seen[-1][1]["error"]["message"]


def test_the_page_asks_as_the_student_and_interactively(ready: World, fake: FakeUpstream) -> None:
    client = ready.client("student")
    ask(client, start(ready, client))
    seen = {name: value for name, value in fake.headers[-1].items() if "x-lectern" in name}
    assert seen == {
        "x-lectern-tenant": f"user-{ready.users['student'].id}",
        "x-lectern-class": "interactive",
    }


def test_a_busy_engine_is_said_in_a_sentence(ready: World, fake: FakeUpstream) -> None:
    error = {"message": "for programs", "type": "rate_limit_error", "code": "engine_overloaded"}
    fake.error, fake.retry_after = (429, {"error": error | {"param": None}}), "12"
    client = ready.client("student")
    path = start(ready, client)
    name, data = ask(client, path)[-1]
    assert name == "error"
    assert data["error"]["code"] == "engine_overloaded"
    assert data["error"]["message"] == "Many are asking now. Try again in 12 s."
    stored = last(client, path)
    assert stored["state"] == "failed"
    assert stored["error"] == "Many are asking now. Try again in 12 s."
    assert client.get("/api/usage").json()["budget_used_today"] == 0
    fake.error = None
    assert ask(client, path)[-1][0] == "done"


def test_engine_that_is_not_there(sqlite_url: str, tmp_path: Path, free_port: int) -> None:
    settings = settings_for(sqlite_url, tmp_path, f"http://127.0.0.1:{free_port}")
    with serve(create_app(settings, FakeRetrieval())) as address:
        world = make_world(settings, address)
        client = world.client("student")
        path = start(world, client)
        seen = ask(client, path)
        assert [name for name, _ in seen] == ["error"]
        assert seen[0][1]["error"]["code"] == "upstream_unavailable"
        assert last(client, path)["state"] == "failed"
        world.close()


class TestBudget:
    @pytest.fixture
    def more_settings(self) -> dict[str, object]:
        return {"daily_tokens": 100}

    def test_page_and_gateway_share_one_budget(self, ready: World) -> None:
        client = ready.client("student")
        path = start(ready, client)
        seen = ask(client, path)  # needs more than is left: refused after the prompt is known
        assert seen[-1][1]["error"]["code"] == "insufficient_quota"
        headers = {"authorization": f"Bearer {ready.key()}"}
        body = {"model": "demo", "prompt": "x", "max_tokens": 60}
        for _ in range(8):
            ready.client().post("/v1/completions", json=body, headers=headers)
        used = client.get("/api/usage").json()["budget_used_today"]
        assert 0 < used <= 100


def test_stopping_the_backend_keeps_the_partial_answer(
    sqlite_url: str, tmp_path: Path, fake: FakeUpstream
) -> None:
    fake.words, fake.delay = ["word "] * 2000, 0.02
    settings = settings_for(sqlite_url, tmp_path, fake.url)
    begun = threading.Event()

    def read(path: str, client: httpx2.Client) -> None:
        try:
            with client.stream("POST", f"{path}/messages", json={"content": "x"}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("event: delta"):
                        begun.set()
        except httpx2.HTTPError:
            begun.set()

    with serve(create_app(settings, FakeRetrieval())) as address:
        world = make_world(settings, address)
        client = world.client("student")
        path = start(world, client)
        reader = threading.Thread(target=read, args=(path, client), daemon=True)
        reader.start()
        assert begun.wait(10)
    reader.join(10)
    stored = service.messages(world.database, int(path.rsplit("/", 1)[1]))[-1]
    assert stored.state == "failed"
    assert stored.content.startswith("word ")
    wait_for(lambda: fake.closed_early == 1)
    world.close()


def test_answers_of_a_killed_backend_are_failed_at_the_next_start(
    world_on_both: World, tmp_path: Path, fake: FakeUpstream
) -> None:
    world = world_on_both
    conversation = service.create(
        world.database, world.course.id, world.users["student"].id, "Killed"
    )
    message = service.ask(world.database, conversation.id, "What was it?", running=False)
    service.write_answer(world.database, message, {"content": "It was"})
    with serve(create_app(world.settings, FakeRetrieval())):
        found = service.messages(world.database, conversation.id)[-1]
    assert (found.state, found.content) == ("failed", "It was")
    assert found.error == service.INTERRUPTED


def test_questions_at_once_get_one_answer(database: Database, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from backend.accounts.models import User
    from backend.courses.models import Course
    from backend.errors import ApiError

    user = User(username="u", display_name="U", role="student", password_hash="-")
    course = Course(slug="c", name="C")
    with database.write() as session:
        session.add_all([user, course])
    conversation = service.create(database, course.id, user.id, "")

    def put(number: int) -> bool:
        try:
            service.ask(database, conversation.id, f"question {number}", running=False)
        except ApiError as error:
            return error.code != "answer_running"
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(16))) == 1
    assert len(service.messages(database, conversation.id)) == 2


def test_titles() -> None:
    assert title_from("  What is\n a   block? ") == "What is a block?"
    assert title_from("word " * 40).endswith("word…")
    assert len(title_from("编" * 200)) <= 61


def test_empty_questions_are_refused(world: World) -> None:
    client = world.client("student")
    path = start(world, client)
    for content in ("", "   ", "x" * 40_000):
        answer = client.post(f"{path}/messages", json={"content": content})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "content"
    assert json.loads(client.get(path).text)["messages"] == []


def test_an_answer_that_could_not_be_stored_blocks_nothing(
    ready: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a full disk leaves behind: an answer that is streaming by its row and runs nowhere."""
    client = ready.client("student")
    path = start(ready, client)
    number = int(path.rsplit("/", 1)[1])
    service.ask(ready.database, number, "basic block", running=False)
    with client.stream("POST", f"{path}/messages", json={"content": "x"}) as answer:
        assert answer.status_code == 409  # it may be about to start
    monkeypatch.setattr(service, "_LOST_AFTER", timedelta(0))
    assert last(client, path)["state"] == "failed"
    name, data = events(list(client.get(f"{path}/stream").iter_lines()))[-1]
    assert (name, data["error"]["message"]) == ("error", service.NOT_STORED)
    assert ask(client, path)[-1][0] == "done"
    states = [message["state"] for message in client.get(path).json()["messages"]]
    assert states == ["complete", "failed", "complete", "complete"]
