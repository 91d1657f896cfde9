"""A backend in memory with the interface of the real one, for the tests of the pages."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse

DOCUMENT = """# Lexical analysis

The scanner turns characters into tokens.

## Longest match

When several rules match, a scanner takes the longest lexeme; among rules of equal length the
first one written wins. This is called maximal munch.

```c
int x = a+++b;   /* scanned as a ++ + b */
```

## Errors

A character that starts no token is reported with its line and then skipped.
"""
CHINESE = """# 语法分析

语法分析器根据文法把记号序列组织成语法树。

## 左递归

自顶向下的分析器不能直接处理左递归文法，需要先消除左递归，否则会无限递归。

## 预测分析表

LL(1) 分析表由 FIRST 集和 FOLLOW 集构造；一个格子里出现两条产生式时，文法不是 LL(1) 的。
"""
ANSWER = (
    "A scanner takes the **longest** lexeme that any rule matches [1]. "
    "自顶向下的分析器需要先消除左递归[2]。\n\n"
    "```c\nint x = a+++b;\n```\n\n"
    "![beacon](https://evil.example/pixel.png?q=secret) "
    "See [the notes](https://notes.example/lex) and <script>alert(1)</script>.\n\n"
    "The cost is $O(n)$ in the length of the input."
)


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


@dataclass
class Person:
    id: int
    username: str
    display_name: str
    role: str
    password: str
    must_change_password: bool = False
    active: bool = True

    def out(self, *, full: bool = False) -> dict[str, Any]:
        body = {
            "id": self.id,
            "username": self.username,
            "display_name": self.display_name,
            "role": self.role,
            "must_change_password": self.must_change_password,
        }
        return {**body, "active": self.active} if full else body


@dataclass
class Answer:
    """A running answer: its text so far, and an event for every change."""

    conversation: dict[str, Any]
    message: dict[str, Any]
    text: str
    delay: float
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    stop: bool = False
    task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        await asyncio.sleep(self.delay)
        for start in range(0, len(self.text), 8):
            if self.stop:
                break
            self.message["content"] += self.text[start : start + 8]
            async with self.changed:
                self.changed.notify_all()
            await asyncio.sleep(self.delay)
        self.message["state"] = "stopped" if self.stop else "complete"
        if not self.stop:
            self.message["citations"] = [p["n"] for p in self.message["passages"]][:2]
        if "break off" in self.conversation["messages"][-2]["content"]:
            self.message["state"] = "failed"
            self.message["error"] = "The engine stopped; the answer so far is kept. Ask again."
        async with self.changed:
            self.changed.notify_all()


def _now() -> str:
    return datetime.now(UTC).isoformat()


class FakeBackend:
    """State and routes; `app` is the ASGI application."""

    def __init__(self, *, delay: float = 0.02, untrained: bool = True) -> None:
        self.delay, self.untrained = delay, untrained
        self.people = [
            Person(1, "root", "Root", "administrator", "root-password"),
            Person(2, "teacher", "陈老师", "teacher", "teacher-password"),
            Person(3, "student", "林同学", "student", "student-password"),
            Person(4, "other", "Other Student", "student", "other-password"),
            Person(5, "fresh", "Fresh", "student", "one-time-password", must_change_password=True),
        ]
        self.sessions: dict[str, int] = {}
        self.failures = 0
        self.courses = [{"id": 1, "slug": "compilers", "name": "Compiler Construction"}]
        self.members: dict[int, dict[int, str]] = {
            1: {2: "teacher", 3: "student", 4: "student", 5: "student"}
        }
        self.documents: list[dict[str, Any]] = []
        self.texts: dict[int, str] = {}
        self.passages: list[dict[str, Any]] = []
        self.conversations: list[dict[str, Any]] = []
        self.answers: dict[int, Answer] = {}
        self.keys: list[dict[str, Any]] = []
        self.seen_cookies: list[str] = []
        self.down = False
        self.may_index = threading.Event()
        self.may_index.set()
        self._next = 100
        self._add_document("lexical-analysis.md", "Lexical analysis", DOCUMENT)
        self._add_document("yufa-fenxi.md", "语法分析", CHINESE)
        failed = self._add_document("locked.pdf", "locked.pdf", "")
        failed.update(
            state="failed",
            passages=0,
            error="This PDF is encrypted; upload a copy without a password.",
        )
        self.app = self._build()

    def _id(self) -> int:
        self._next += 1
        return self._next

    def _add_document(self, name: str, title: str, text: str) -> dict[str, Any]:
        document = {
            "id": self._id(),
            "course_id": 1,
            "name": name,
            "title": title,
            "state": "ready",
            "error": None,
            "bytes": len(text.encode()),
            "uploaded_at": _now(),
            "progress": 1.0,
        }
        self.texts[document["id"]] = text
        count = 0
        for position, section in enumerate(text.split("\n## ")):
            if position and section.strip():
                start = text.index(section)
                heading = section.splitlines()[0]
                self.passages.append(
                    {
                        "id": self._id(),
                        "document_id": document["id"],
                        "document": name,
                        "title": title,
                        "heading_path": [title, heading],
                        "page": None,
                        "start": start,
                        "end": start + len(section.rstrip()),
                        "text": section.rstrip(),
                        "score": 0.03,
                    }
                )
                count += 1
        document["passages"] = count
        self.documents.append(document)
        return document

    # -- who ----------------------------------------------------------------------------------

    def person(self, request: Request, *, changing: bool = False) -> Person:
        if self.down:
            raise Refusal(503, "unavailable", "The backend is away.")
        token = request.cookies.get("lectern_session", "")
        self.seen_cookies.append(token)
        found = next((p for p in self.people if p.id == self.sessions.get(token)), None)
        if found is None or not found.active:
            raise Refusal(401, "not_signed_in", "Sign in first.")
        if found.must_change_password and not changing:
            raise Refusal(403, "password_change_required", "Change your one-time password first.")
        return found

    def course(self, request: Request, course_id: int) -> Person:
        person = self.person(request)
        if person.role != "administrator" and person.id not in self.members.get(course_id, {}):
            raise Refusal(404, "not_found", "There is no such course.")
        return person

    def conversation(self, request: Request, conversation_id: int) -> dict[str, Any]:
        person = self.person(request)
        for conversation in self.conversations:
            if conversation["id"] == conversation_id and conversation["user"] == person.id:
                return conversation
        raise Refusal(404, "not_found", "There is no such conversation.")

    def administrator(self, request: Request) -> Person:
        person = self.person(request)
        if person.role != "administrator":
            raise Refusal(403, "forbidden", "Only an administrator may do this.")
        return person

    def login_out(self, person: Person) -> dict[str, Any]:
        token = secrets.token_urlsafe(32)
        self.sessions[token] = person.id
        expires = datetime.now(UTC) + timedelta(days=7)
        return {"token": token, "expires_at": expires.isoformat(), "user": person.out()}

    def _build(self) -> FastAPI:
        app = FastAPI()

        @app.exception_handler(Refusal)
        async def refused(_: Request, error: Refusal) -> JSONResponse:
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
            body = {"message": error.message, "type": "error", "param": None, "code": error.code}
            # A careless backend sets cookies of its own; the pages must not keep them.
            response = JSONResponse({"error": body}, error.status, headers)
            response.set_cookie("lectern_session", "planted")
            return response

        self._account_routes(app)
        self._course_routes(app)
        self._conversation_routes(app)
        self._other_routes(app)
        return app

    def _account_routes(self, app: FastAPI) -> None:
        @app.post("/api/auth/login")
        async def login(request: Request) -> Any:
            if self.down:
                raise Refusal(503, "unavailable", "The backend is away.")
            body = await request.json()
            if self.failures >= 5:
                raise Refusal(429, "too_many_attempts", "Too many attempts.", 17)
            for person in self.people:
                known = (person.username, person.password) == (body["username"], body["password"])
                if known and person.active:
                    self.failures = 0
                    return self.login_out(person)
            self.failures += 1
            raise Refusal(401, "invalid_credentials", "User name or password is wrong.")

        @app.post("/api/auth/logout", status_code=204)
        async def logout(request: Request) -> Response:
            self.person(request, changing=True)
            self.sessions.pop(request.cookies["lectern_session"])
            return Response(status_code=204)

        @app.post("/api/auth/password")
        async def password(request: Request) -> Any:
            person = self.person(request, changing=True)
            body = await request.json()
            if body["current_password"] != person.password:
                raise Refusal(401, "invalid_credentials", "The current password is wrong.")
            if len(body["new_password"]) < 10:
                raise Refusal(400, "password_too_short", "Use at least 10 characters.")
            person.password, person.must_change_password = body["new_password"], False
            self.sessions = {t: p for t, p in self.sessions.items() if p != person.id}
            return self.login_out(person)

        @app.get("/api/me")
        async def me(request: Request) -> Any:
            person = self.person(request, changing=True)
            courses = [
                {**course, "role": self.members[course["id"]].get(person.id, "teacher")}
                for course in self.courses
                if person.role == "administrator" or person.id in self.members[course["id"]]
            ]
            model = {"id": "lectern-demo", "untrained": self.untrained, "available": True}
            return {"user": person.out(), "courses": courses, "model": model}

        @app.get("/api/users")
        async def users(request: Request) -> Any:
            self.administrator(request)
            return [person.out(full=True) for person in self.people]

        @app.post("/api/users", status_code=201)
        async def add_user(request: Request) -> Any:
            self.administrator(request)
            body = await request.json()
            if not body["username"]:
                raise Refusal(400, "invalid_value", "username: give a user name.")
            password = secrets.token_urlsafe(9)
            person = Person(
                self._id(), body["username"], body["display_name"], body["role"], password, True
            )
            self.people.append(person)
            return {"user": person.out(full=True), "one_time_password": password}

        @app.post("/api/users/{user_id}/reset")
        async def reset(user_id: int, request: Request) -> Any:
            self.administrator(request)
            person = next(p for p in self.people if p.id == user_id)
            person.password, person.must_change_password = secrets.token_urlsafe(9), True
            return {"one_time_password": person.password}

        @app.patch("/api/users/{user_id}")
        async def change(user_id: int, request: Request) -> Any:
            self.administrator(request)
            person = next(p for p in self.people if p.id == user_id)
            for name, value in (await request.json()).items():
                setattr(person, name, value)
            return person.out(full=True)

    def _course_routes(self, app: FastAPI) -> None:
        @app.post("/api/courses", status_code=201)
        async def add_course(request: Request) -> Any:
            person = self.person(request)
            course = {"id": self._id(), **await request.json()}
            self.courses.append(course)
            self.members[course["id"]] = {person.id: "teacher"}
            return {**course, "role": "teacher"}

        @app.get("/api/courses/{course_id}/members")
        async def members(course_id: int, request: Request) -> Any:
            self.course(request, course_id)
            return [
                {**p.out(), "role": self.members[course_id][p.id]}
                for p in self.people
                if p.id in self.members[course_id]
            ]

        @app.post("/api/courses/{course_id}/members", status_code=201)
        async def add_member(course_id: int, request: Request) -> Any:
            self.course(request, course_id)
            body = await request.json()
            for person in self.people:
                if person.username == body["username"]:
                    self.members[course_id][person.id] = body["role"]
                    return {**person.out(), "role": body["role"]}
            raise Refusal(404, "not_found", "There is no user with this name.")

        @app.delete("/api/courses/{course_id}/members/{user_id}", status_code=204)
        async def remove_member(course_id: int, user_id: int, request: Request) -> Response:
            self.course(request, course_id)
            self.members[course_id].pop(user_id)
            return Response(status_code=204)

        @app.get("/api/courses/{course_id}/documents")
        async def documents(course_id: int, request: Request) -> Any:
            self.course(request, course_id)
            return [d for d in self.documents if d["course_id"] == course_id]

        @app.post("/api/courses/{course_id}/documents", status_code=202)
        async def upload(course_id: int, file: UploadFile, request: Request) -> Any:
            self.course(request, course_id)
            text = (await file.read()).decode()
            document = self._add_document(file.filename or "?", file.filename or "?", text)
            document.update(course_id=course_id, state="queued", progress=0.0)

            async def index() -> None:
                document.update(state="indexing", progress=0.4)
                await asyncio.to_thread(self.may_index.wait)
                document.update(state="ready", progress=1.0)

            self._indexing = asyncio.create_task(index())
            return document

        @app.delete("/api/courses/{course_id}/documents/{document_id}", status_code=204)
        async def remove(course_id: int, document_id: int, request: Request) -> Response:
            self.course(request, course_id)
            self.documents = [d for d in self.documents if d["id"] != document_id]
            self.passages = [p for p in self.passages if p["document_id"] != document_id]
            return Response(status_code=204)

        @app.post("/api/courses/{course_id}/documents/{document_id}/retry", status_code=202)
        async def retry(course_id: int, document_id: int, request: Request) -> Any:
            self.course(request, course_id)
            document = next(d for d in self.documents if d["id"] == document_id)
            document.update(state="queued", error=None)
            return document

        @app.get("/api/courses/{course_id}/documents/{document_id}/text")
        async def text(course_id: int, document_id: int, request: Request) -> Any:
            self.course(request, course_id)
            document = next(d for d in self.documents if d["id"] == document_id)
            return {"title": document["title"], "text": self.texts[document_id]}

        @app.get("/api/courses/{course_id}/search")
        async def search(course_id: int, q: str, request: Request, k: int = 8) -> Any:
            self.course(request, course_id)
            return {"passages": self._search(q)[:k]}

        @app.get("/api/courses/{course_id}/passages/{passage_id}")
        async def passage(course_id: int, passage_id: int, request: Request) -> Any:
            self.course(request, course_id)
            found = next((p for p in self.passages if p["id"] == passage_id), None)
            if found is None:
                raise Refusal(404, "not_found", "There is no such passage.")
            text = self.texts[found["document_id"]]
            before, after = text[: found["start"]], text[found["end"] :]
            return {**found, "before": before[-600:], "after": after[:600]}

    def _search(self, query: str) -> list[dict[str, Any]]:
        if "nothing" in query:
            return []
        words = query.lower().split()
        return sorted(
            self.passages, key=lambda p: -sum(word in p["text"].lower() for word in words)
        )

    def _conversation_routes(self, app: FastAPI) -> None:
        @app.get("/api/courses/{course_id}/conversations")
        async def conversations(course_id: int, request: Request) -> Any:
            person = self.course(request, course_id)
            mine = [c for c in self.conversations if c["user"] == person.id]
            return [
                {key: c[key] for key in ("id", "course_id", "title", "created_at")}
                for c in reversed(mine)
            ]

        @app.post("/api/courses/{course_id}/conversations", status_code=201)
        async def add(course_id: int, request: Request) -> Any:
            person = self.course(request, course_id)
            body = await request.json()
            conversation = {
                "id": self._id(),
                "course_id": course_id,
                "title": body.get("title") or "",
                "user": person.id,
                "messages": [],
                "created_at": _now(),
            }
            self.conversations.append(conversation)
            return conversation

        @app.get("/api/conversations/{conversation_id}")
        async def get(conversation_id: int, request: Request) -> Any:
            return self.conversation(request, conversation_id)

        @app.patch("/api/conversations/{conversation_id}")
        async def rename(conversation_id: int, request: Request) -> Any:
            conversation = self.conversation(request, conversation_id)
            conversation["title"] = (await request.json())["title"]
            return conversation

        @app.delete("/api/conversations/{conversation_id}", status_code=204)
        async def delete(conversation_id: int, request: Request) -> Response:
            self.conversations.remove(self.conversation(request, conversation_id))
            return Response(status_code=204)

        @app.post("/api/conversations/{conversation_id}/messages")
        async def ask(conversation_id: int, request: Request) -> Any:
            conversation = self.conversation(request, conversation_id)
            question = (await request.json())["content"]
            if "refuse" in question:
                raise Refusal(400, "context_length_exceeded", "The question is too long.")
            if conversation_id in self.answers:
                raise Refusal(409, "answer_running", "An answer is running.")
            found = [{**p, "n": n} for n, p in enumerate(self._search(question)[:4], start=1)]
            asked = {"id": self._id(), "role": "user", "content": question, "state": "complete"}
            message: dict[str, Any] = {
                "id": self._id(),
                "role": "assistant",
                "content": "",
                "state": "streaming",
                "error": None,
                "passages": found,
                "citations": [],
                "left_out": {"turns": 0, "passages": 1 if "long" in question else 0},
                "created_at": _now(),
            }
            conversation["messages"] += [asked, message]
            delay = 0.12 if "slow" in question else self.delay
            answer = Answer(conversation, message, ANSWER, delay)
            self.answers[conversation_id] = answer
            answer.task = asyncio.create_task(answer.run())
            return StreamingResponse(
                self._follow(conversation_id, answer, whole=True), media_type="text/event-stream"
            )

        @app.get("/api/conversations/{conversation_id}/stream")
        async def stream(conversation_id: int, request: Request) -> Any:
            self.conversation(request, conversation_id)
            answer = self.answers.get(conversation_id)
            if answer is None:
                raise Refusal(404, "not_found", "No answer is running.")
            return StreamingResponse(
                self._follow(conversation_id, answer, whole=False), media_type="text/event-stream"
            )

        @app.post("/api/conversations/{conversation_id}/stop", status_code=204)
        async def stop(conversation_id: int, request: Request) -> Response:
            self.conversation(request, conversation_id)
            answer = self.answers.get(conversation_id)
            if answer is not None and answer.task is not None:
                answer.stop = True
                await answer.task
                self.answers.pop(conversation_id, None)
            return Response(status_code=204)

    async def _follow(
        self, conversation_id: int, answer: Answer, *, whole: bool
    ) -> AsyncIterator[str]:
        def event(name: str, data: dict[str, Any]) -> str:
            return f"event: {name}\ndata: {json.dumps(data)}\n\n"

        message = answer.message
        if whole:
            yield event(
                "passages",
                {
                    "message_id": message["id"],
                    "passages": message["passages"],
                    "left_out": message["left_out"],
                },
            )
        yield ": ping\n\n"
        sent = 0
        while True:
            async with answer.changed:
                if message["state"] == "streaming" and len(message["content"]) == sent:
                    await answer.changed.wait()
            text = message["content"][sent:]
            sent += len(text)
            if text:
                yield event("delta", {"text": text})
            if message["state"] != "streaming":
                break
        self.answers.pop(conversation_id, None)
        if message["state"] == "failed":
            yield event("error", {"error": {"message": message["error"], "code": "engine"}})
        else:
            citations = message["citations"]
            done = {"message_id": message["id"], "finish_reason": "stop", "citations": citations}
            yield event("done", done)

    def _other_routes(self, app: FastAPI) -> None:
        @app.get("/api/keys")
        async def keys(request: Request) -> Any:
            person = self.person(request)
            hidden = {"key", "user"}
            return [
                {name: value for name, value in key.items() if name not in hidden}
                for key in self.keys
                if key["user"] == person.id
            ]

        @app.post("/api/keys", status_code=201)
        async def add_key(request: Request) -> Any:
            person = self.person(request)
            body = await request.json()
            secret = "sk-" + secrets.token_hex(20)
            days = body.get("expires_in_days")
            expires = datetime.now(UTC) + timedelta(days=days) if days else None
            key = {
                "id": self._id(),
                "user": person.id,
                "name": body["name"],
                "prefix": secret[:8],
                "last4": secret[-4:],
                "created_at": _now(),
                "last_used_at": None,
                "expires_at": expires.isoformat() if expires else None,
                "revoked": False,
                "service_class": "standard",
                "key": secret,
            }
            self.keys.append(key)
            return key

        @app.delete("/api/keys/{key_id}", status_code=204)
        async def revoke(key_id: int, request: Request) -> Response:
            self.person(request)
            next(key for key in self.keys if key["id"] == key_id)["revoked"] = True
            return Response(status_code=204)

        @app.get("/api/usage")
        async def usage(request: Request, days: int = 30) -> Any:
            self.person(request)
            today = datetime.now(UTC).date()
            rows = [
                {
                    "date": (today - timedelta(days=back)).isoformat(),
                    "prompt_tokens": (back * 733) % 5000,
                    "completion_tokens": (back * 397) % 2600,
                    "requests": back % 7,
                }
                for back in range(days - 1, -1, -1)
            ]
            fields = ("prompt_tokens", "completion_tokens", "requests")
            total = {name: sum(int(row[name]) for row in rows) for name in fields}
            return {
                "days": rows,
                "total": total,
                "budget_tokens": 200_000,
                "budget_used_today": 51_200,
            }

        @app.get("/api/admin/overview")
        async def overview(request: Request) -> Any:
            self.administrator(request)
            return _overview()


def _overview() -> dict[str, Any]:
    now = datetime.now(UTC).timestamp()
    series = [
        {
            "t": now - 2 * back,
            "generation_tokens_s": 310 + 60 * ((back * 37) % 11) / 11,
            "requests_running": 10 + (back * 7) % 9,
            "ttft_p50_s": 0.11 + 0.05 * ((back * 13) % 7) / 7,
            "tpot_p50_s": 0.021 + 0.008 * ((back * 5) % 6) / 6,
            "kv_used": 300 + (back * 11) % 90,
        }
        for back in range(90, -1, -1)
    ]
    stages = [
        {"stage": 0, "busy": 1.62, "wait_input": 0.21, "wait_link": 0.09, "idle": 0.08},
        {"stage": 1, "busy": 1.48, "wait_input": 0.33, "wait_link": 0.05, "idle": 0.14},
    ]
    engine = {
        "reachable": True,
        "model": "lectern-demo",
        "requests_running": 14,
        "requests_waiting": 3,
        "prompt_tokens_s": 812.4,
        "generation_tokens_s": 347.9,
        "ttft_p50_s": 0.132,
        "ttft_p95_s": 0.418,
        "tpot_p50_s": 0.0247,
        "tpot_p95_s": 0.0391,
        "kv_pages": {"free": 1210, "cached": 470, "used": 368},
        "preemptions": 2,
        "stages": stages,
    }
    backend = {"streams": 14, "index_jobs": {"queued": 0, "indexing": 1}, "login_failures": 2}
    return {"engine": engine, "series": series, "backend": backend}
