"""`lectern serve` as a process: start, answer, hang-up, death of a stage, clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from serving.demo_model import ensure_demo_model
from serving.demo_model.make import served_name
from tests.serving.api.server import events, text_of

ROOT = Path(__file__).resolve().parents[3]

MODEL = served_name()


class Served:
    """A running `lectern serve`; its standard error is read as it comes."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve", *arguments],
            cwd=ROOT,
            env={**os.environ, "LECTERN_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern} did not come:\n{''.join(self.log)}")

    def stages(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "serving.stage" in child.cmdline()]

    def end(self) -> int:
        """SIGTERM, and wait for it and everything below it."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=30)
        self.log.append(log)
        _, alive = psutil.wait_procs(below, timeout=5)
        assert not alive
        return self.process.returncode


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("home")
    ensure_demo_model(found / "demo-model")
    return found


@pytest.fixture(scope="module")
def demo(home: Path) -> Iterator[tuple[Served, str]]:
    served = Served(
        home, "demo", "--port", "0", "--pipeline-parallel-size", "2", "--kv-memory", "64M",
        "--threads", "1",
    )  # fmt: skip
    try:
        address = served.read_until(rf"ready model={MODEL} url=(\S+)/v1")[1]
        yield served, address
        assert served.end() == 0
        assert "Traceback" not in served.log[-1]
    finally:
        served.process.kill()
        served.process.wait()


def figures(address: str) -> dict[str, float]:
    text = httpx2.get(f"{address}/metrics").text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def test_the_official_client_chats(demo: tuple[Served, str]) -> None:
    _, address = demo
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        [model] = client.models.list().data
        extras: Any = model.model_dump()
        assert extras["x_lectern"] == {"untrained": True, "has_tokenizer": True}
        arguments: dict[str, Any] = {
            "model": model.id,
            "messages": [{"role": "user", "content": "什么是词法分析？"}],
            "max_tokens": 24,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**arguments)
        stream = client.chat.completions.create(**arguments, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        assert text
        again = client.chat.completions.create(**{**arguments, "temperature": 1, "seed": 3, "n": 2})
        third = client.chat.completions.create(**{**arguments, "temperature": 1, "seed": 3, "n": 2})
        first, second = (choice.message.content for choice in again.choices)
        assert first != second
        assert [choice.message.content for choice in third.choices] == [first, second]


def test_log_probabilities_and_stop_ids(demo: tuple[Served, str]) -> None:
    _, address = demo
    body = {
        "model": MODEL, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0,
        "logprobs": 3,
    }  # fmt: skip
    choice = httpx2.post(f"{address}/v1/completions", json=body).json()["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == 6
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    with httpx2.Client(base_url=address) as client:
        ids = client.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "hello"}


def test_a_hang_up_frees_all_pages(demo: tuple[Served, str]) -> None:
    _, address = demo
    body = {
        "model": MODEL, "prompt": "hello " * 50, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with httpx2.stream("POST", f"{address}/v1/completions", json=body) as response:
        next(response.iter_lines())
    end = time.monotonic() + 20
    used = f'lectern_engine_kv_pages{{model_name="{MODEL}",state="used"}}'
    while figures(address)[used] and time.monotonic() < end:
        time.sleep(0.1)
    assert figures(address)[used] == 0


def streamed(address: str, max_tokens: int, after_two: Callable[[], None]) -> list[Any]:
    """The events of an answer in a stream, of which the first ones have come."""
    body = {
        "model": MODEL, "prompt": "hello", "ignore_eos": True, "stream": True, "temperature": 0,
        "max_tokens": max_tokens,
    }  # fmt: skip
    lines: list[str] = []
    with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 2:
                after_two()
    return events("\n".join(lines) + "\n")


def test_a_stream_goes_on_over_a_killed_stage(demo: tuple[Served, str]) -> None:
    served, address = demo
    undisturbed = streamed(address, 600, lambda: None)
    seen: list[int] = []

    def kill() -> None:
        served.stages()[-1].kill()
        served.read_until("a stage died and the stages are being restarted reason=.*SIGKILL")
        seen.append(httpx2.get(f"{address}/health").status_code)

    found = streamed(address, 600, kill)
    assert found[-1] == "[DONE]"
    assert text_of(found) == text_of(undisturbed)
    assert seen == [503]
    served.read_until("the stages are ready again")
    assert httpx2.get(f"{address}/health").status_code == 200
    end = time.monotonic() + 20
    restarts = f'lectern_engine_stage_restarts_total{{model_name="{MODEL}"}}'
    while not figures(address)[restarts] and time.monotonic() < end:
        time.sleep(0.1)
    assert figures(address)[restarts] == 1
    assert figures(address)[f'lectern_engine_restarts_total{{model_name="{MODEL}"}}'] == 0


def test_a_killed_driver_ends_the_stream_and_comes_back(demo: tuple[Served, str]) -> None:
    served, address = demo

    def kill() -> None:
        children = psutil.Process(served.process.pid).children(recursive=True)
        [driver] = [child for child in children if "serving.driver" in child.cmdline()]
        driver.kill()

    found = streamed(address, 4000, kill)
    assert found[-1]["error"]["code"] == "engine_restarting"
    assert text_of(found[:-1])
    served.read_until("the engine is ready again")
    assert any("died and is being restarted" in line for line in served.log)
    assert httpx2.get(f"{address}/health").status_code == 200
    assert figures(address)[f'lectern_engine_restarts_total{{model_name="{MODEL}"}}'] == 1


def test_a_folder_without_tokenizer(home: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(home / "demo-model" / name)
    served = Served(home, str(tmp_path), "--port", "0", "--served-model-name", "bare/one")
    try:
        address = served.read_until(r"ready model=bare/one url=(\S+)/v1")[1]
        with httpx2.Client(base_url=address) as client:
            ask = {"model": "bare/one", "max_tokens": 3, "ignore_eos": True}
            body = client.post("/v1/completions", json={**ask, "prompt": [1, 2]}).json()
            assert body["choices"][0]["text"] == ""
            assert body["usage"]["completion_tokens"] == 3
            assert client.post("/v1/completions", json={**ask, "prompt": "x"}).status_code == 400
            assert client.get("/v1/models/bare/one").json()["x_lectern"]["has_tokenizer"] is False
        assert served.end() == 0
    finally:
        served.process.kill()
        served.process.wait()


def refuse(home: Path, *arguments: str) -> str:
    served = Served(home, *arguments)
    _, log = served.process.communicate(timeout=120)
    assert served.process.returncode == 2, log
    assert "Traceback" not in log
    told = [line for line in log.splitlines() if line.startswith("lectern: ")]
    assert len(told) == 1
    return told[0]


def test_a_port_in_use(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refuse(home, "demo", "--port", str(port))
    assert f"Port {port}" in told
    assert "--port" in told


def test_bad_folders_and_numbers(home: Path, tmp_path: Path) -> None:
    assert "does not exist" in refuse(home, "/nowhere", "--port", "0")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel is not supported" in refuse(home, str(tmp_path), "--port", "0")
    assert "--page-size" in refuse(home, "demo", "--port", "0", "--page-size", "15")
    assert "holds no weights" in refuse(home, "qwen3-0.6b", "--port", "0")


def test_ending_while_it_starts(home: Path) -> None:
    served = Served(home, "demo", "--port", "0", "--kv-memory", "64M")
    served.read_until("loading weights|KV pages")
    assert served.end() == 0
    assert "Traceback" not in "".join(served.log)
