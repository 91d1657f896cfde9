"""The client of an engine: what it asks, and what it says when there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rag.cli import register
from rag.engine_client import EngineError, running_engine
from rag.prompt import Message


class Stub(BaseHTTPRequestHandler):
    """Speaks as much of the API as the client uses."""

    asked: list[tuple[str, Any]]

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "m", "max_model_len": 512}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if body["messages"][0]["content"] == "bad":
            self.reply({"error": {"message": "refused"}}, 400)
        elif self.path == "/tokenize":
            self.reply({"count": 7})
        else:
            self.reply({"choices": [{"message": {"content": "According to [1]: yes."}}]})

    def reply(self, value: object, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    asked: list[tuple[str, Any]] = []
    handler = type("Handler", (Stub,), {"asked": asked})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_counts_and_asks_greedily(stub: tuple[str, list[tuple[str, Any]]]) -> None:
    url, asked = stub
    messages: list[Message] = [{"role": "user", "content": "Why?"}]
    with running_engine("ignored", url) as client:
        assert client.context_tokens == 512
        assert client.count(messages) == 7
        assert client.answer(messages, 9) == "According to [1]: yes."
    assert asked[0] == ("/tokenize", {"model": "m", "messages": messages})
    assert asked[1][1] == {
        "model": "m", "messages": messages, "max_tokens": 9, "temperature": 0.0
    }  # fmt: skip


def test_a_refusal_names_the_path(stub: tuple[str, list[tuple[str, Any]]]) -> None:
    with running_engine("ignored", stub[0]) as client:
        with pytest.raises(EngineError, match="400 to /tokenize"):
            client.count([{"role": "user", "content": "bad"}])


def test_no_engine_at_the_address() -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        with running_engine("ignored", "http://127.0.0.1:9"):
            pass


def test_an_engine_that_does_not_start_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match="ended with code"):
        with running_engine(str(tmp_path / "nothing")):
            pass
    assert "nothing" in capfd.readouterr().err


def test_the_command_ends_with_one_json_object(
    stub: tuple[str, list[tuple[str, Any]]], tmp_path: Path
) -> None:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    file = tmp_path / "transcripts.jsonl"
    words = ["eval", "answers", "--engine", stub[0], "--embedder", "hashing", "--passages", "4"]
    result = CliRunner().invoke(app, [*words, "--json", "--transcripts", str(file)])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert list(summary) == [
        "n", "citation_accuracy", "first_passage_baseline", "key_phrase", "refusal",
        "false_refusal",
    ]  # fmt: skip
    assert summary["n"] == 60
    assert summary["citation_accuracy"] == summary["first_passage_baseline"] < 0.6
    assert summary["refusal"] == summary["false_refusal"] == 0.0
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert len(rows) == 80
    assert sum(row["answerable"] for row in rows) == 60
    assert all(row["cited"] == [1] and row["messages"] for row in rows)
