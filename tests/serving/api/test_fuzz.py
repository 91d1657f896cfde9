"""Random bodies, near to valid ones: never a 500, always an error object or an answer."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.api.fields import CHAT, COMPLETION, IGNORED, REFUSED
from tests.serving.api.server import Server, events

NAMES = sorted(CHAT | COMPLETION | IGNORED | set(REFUSED))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["", "none", "auto", "user", "system", "text", "tiny", "\U0001f600", "\x00"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "a"])
            | st.text(max_size=6),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), VALUES, max_size=4)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={"content": VALUES, "tool_calls": VALUES, "name": VALUES, "reasoning": VALUES},
    ),
    max_size=3,
)
RELAXED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(server: Server, path: str, body: Any) -> None:
    response = server.kept_client.post(path, content=msgspec.json.encode(body))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert events(response.text)[-1] == "[DONE]"
        else:
            response.json()
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@RELAXED
@given(fields=FIELDS, messages=MESSAGES | VALUES)
def test_chat(server_once: Server, fields: dict[str, Any], messages: Any) -> None:
    check(
        server_once,
        "/v1/chat/completions",
        {"model": "tiny", "messages": messages, "max_tokens": 3, **fields},
    )


@RELAXED
@given(fields=FIELDS, prompt=VALUES)
def test_completions(server_once: Server, fields: dict[str, Any], prompt: Any) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 3, **fields}
    check(server_once, "/v1/completions", body)


@RELAXED
@given(body=FIELDS, value=VALUES)
def test_tokenize(server_once: Server, body: dict[str, Any], value: Any) -> None:
    check(server_once, "/tokenize", {**body, "prompt": value})
    check(server_once, "/tokenize", {**body, "messages": value})
    check(server_once, "/detokenize", {**body, "tokens": value})
