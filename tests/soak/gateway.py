"""Soak test of the whole platform: `make soak`.

Starts `lectern up` on the demo model in a state directory of its own, makes students with keys
through the public API, and lets 200 clients stream through the gateway for two minutes; one in
ten hangs up in mid-stream. It then checks that nothing failed that was not meant to, that every
other stream ended with a finish_reason and [DONE], that all KV pages are free, and that the
memory of all processes stayed within 5 % of what it was after one minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import httpx2
import psutil

from tests.soak.memory import memory_bytes

ROOT = Path(__file__).parents[2]
PASSWORD = "soak-" + random.SystemRandom().randbytes(12).hex()


@dataclass
class Tally:
    finished: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    hung_up: int = 0
    chunks: int = 0
    first_chunk_seconds: list[float] = field(default_factory=list)


class Stream:
    """One streamed answer, read off a raw connection so that 200 cost little."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.status = 0
        self.events: list[bytes] = []
        self.complete = False

    def on_body(self, data: bytes) -> None:
        *events, self.body = (self.body + data).split(b"\n\n")
        self.events += [e[6:] for e in events if e.startswith(b"data: ")]

    def on_message_complete(self) -> None:
        self.complete = True

    def feed(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self.status = self.parser.get_status_code()


async def one_answer(
    port: int, key: str, model: str, rng: random.Random, tally: Tally, end: float
) -> None:
    tokens = rng.randint(64, 256)
    hang_up_after = rng.randint(1, tokens // 2) if rng.random() < 0.1 else None
    words = " ".join(rng.choice(("parser", "lexer", "寄存器", "graph", "语法")) for _ in range(20))
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "temperature": 0.8,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer " + key.encode() +
            b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        started = time.monotonic()
        stream = Stream()
        while not stream.complete:
            data = await asyncio.wait_for(reader.read(65536), 120)
            if not data:
                break
            if not stream.events:
                tally.first_chunk_seconds.append(time.monotonic() - started)
            stream.feed(data)
            if hang_up_after is not None and len(stream.events) > hang_up_after:
                tally.hung_up += 1
                return
        tally.chunks += len(stream.events)
        judge(stream, tally)
    except (TimeoutError, OSError, httptools.HttpParserError) as error:
        tally.errors.append(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


def judge(stream: Stream, tally: Tally) -> None:
    if stream.status != 200:
        tally.errors.append(f"status {stream.status}: {stream.body[:200]!r}")
        return
    if not stream.events or stream.events[-1].strip() != b"[DONE]":
        tally.errors.append(f"no [DONE]; last event {stream.events[-1:]!r}")
        return
    reasons = [
        choice["finish_reason"]
        for event in stream.events[-4:-1]
        for choice in json.loads(event).get("choices", [])
        if choice.get("finish_reason")
    ]
    if len(reasons) != 1:
        tally.errors.append(f"finish reasons {reasons}")
        return
    tally.finished[reasons[0]] += 1


async def client(number: int, port: int, key: str, model: str, end: float, tally: Tally) -> None:
    rng = random.Random(number)
    await asyncio.sleep(rng.random() * 2)
    while time.monotonic() < end:
        await one_answer(port, key, model, rng, tally, end)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def sign_in(api: httpx2.Client, username: str, one_time: str) -> dict[str, str]:
    """First login of an account: change the one-time password, return the session header."""
    token = api.post(
        "/api/auth/login", json={"username": username, "password": one_time}
    ).raise_for_status().json()["token"]  # fmt: skip
    changed = api.post(
        "/api/auth/password",
        json={"current_password": one_time, "new_password": PASSWORD},
        headers={"Cookie": f"lectern_session={token}"},
    ).raise_for_status()
    return {"Cookie": f"lectern_session={changed.json()['token']}"}


def make_keys(api: httpx2.Client, home: Path, students: int) -> list[str]:
    login = (home / "initial-login").read_text()
    one_time = first_password(login)
    admin = sign_in(api, "admin", one_time)
    keys = []
    for number in range(students):
        name = f"soak{number}"
        made = api.post(
            "/api/users",
            json={"username": name, "display_name": name, "role": "student"},
            headers=admin,
        ).raise_for_status()
        session = sign_in(api, name, made.json()["one_time_password"])
        key = api.post("/api/keys", json={"name": "soak"}, headers=session).raise_for_status()
        keys.append(key.json()["key"])
        print(f"\rstudents {number + 1}/{students}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return keys


def first_password(login: str) -> str:
    """The administrator's one-time password from the text of `initial-login`."""
    for line in login.splitlines():
        words = line.split()
        if "admin" in words:
            return words[-1]
    raise SystemExit("initial-login names no administrator")


def pages(api: httpx2.Client) -> dict[str, float]:
    text = api.get("/metrics").raise_for_status().text
    return {
        line.split('state="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("lectern_engine_kv_pages{")
    }


async def soak(arguments: argparse.Namespace, port: int, keys: list[str], model: str,
               root: psutil.Process) -> tuple[Tally, int, int]:  # fmt: skip
    tally = Tally()
    start = time.monotonic()
    end = start + arguments.seconds
    clients = [
        asyncio.create_task(client(i, port, keys[i % len(keys)], model, end, tally))
        for i in range(arguments.clients)
    ]
    await asyncio.sleep(arguments.seconds / 2)
    early = memory_bytes(root)
    await asyncio.sleep(max(0.0, end - time.monotonic() - 1))
    late = memory_bytes(root)
    await asyncio.gather(*clients)
    return tally, early, late


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--students", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    web, backend, engine = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="lectern-soak-") as folder:
        home = Path(folder) / "home"
        platform = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "up", "--home", str(home),
             "--web-port", str(web), "--backend-port", str(backend),
             "--engine-port", str(engine)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert platform.stdout is not None
            for line in platform.stdout:
                print(line, end="", file=sys.stderr)
                if line.startswith("Lectern is ready"):
                    break
            with (
                httpx2.Client(base_url=f"http://127.0.0.1:{backend}", timeout=60) as api,
                httpx2.Client(base_url=f"http://127.0.0.1:{engine}", timeout=60) as engine_api,
            ):
                keys = make_keys(api, home, arguments.students)
                model = api.get(
                    "/v1/models", headers={"Authorization": f"Bearer {keys[0]}"}
                ).json()["data"][0]["id"]  # fmt: skip
                tally, early, late = asyncio.run(
                    soak(arguments, backend, keys, model, psutil.Process(platform.pid))
                )
                deadline = time.monotonic() + 20
                while (left := pages(engine_api))["used"] and time.monotonic() < deadline:
                    time.sleep(0.5)
            return report(arguments, tally, early, late, left)
        finally:
            platform.terminate()
            platform.wait()


def report(
    arguments: argparse.Namespace, tally: Tally, early: int, late: int, left: dict[str, float]
) -> int:
    growth = late / early - 1
    waits = sorted(tally.first_chunk_seconds) or [0.0]
    result: dict[str, Any] = {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "finished": dict(tally.finished),
        "hung_up": tally.hung_up,
        "errors": len(tally.errors),
        "chunks_per_second": round(tally.chunks / arguments.seconds, 1),
        "first_chunk_p50_s": round(waits[len(waits) // 2], 2),
        "first_chunk_p99_s": round(waits[int(len(waits) * 0.99)], 2),
        "memory_mib": [early >> 20, late >> 20],
        "memory_growth": round(growth, 4),
        "kv_pages": left,
    }
    for line in tally.errors[:10]:
        print(line, file=sys.stderr)
    print(json.dumps(result))
    good = (
        not tally.errors
        and tally.hung_up > 0
        and sum(tally.finished.values()) > 0
        and left["used"] == 0
        and abs(growth) <= 0.05
    )
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
