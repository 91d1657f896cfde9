"""The model server behind us: any OpenAI-style upstream, spoken to over HTTP only."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from backend.errors import ApiError

_MODEL_SECONDS = 5.0
_RETRY_AFTER = "5"
_MAX_CONNECTIONS = 1024
_SECONDS = re.compile(r"[0-9]{1,5}")
_WIDE = re.compile(r"[^\x00-\x7f]")


@dataclass(frozen=True)
class ModelInfo:
    """What /v1/models says; `is_lectern` is whether cache salts are understood."""

    id: str
    max_model_len: int | None
    untrained: bool
    has_tokenizer: bool
    is_lectern: bool


def unavailable() -> ApiError:
    return ApiError(
        503,
        "upstream_unavailable",
        "The model server is not answering. It may be starting; try again in a moment.",
        headers={"Retry-After": _RETRY_AFTER},
    )


def estimate_tokens(text: str) -> int:
    """A cautious guess without the tokenizer: 3 ASCII characters a token, 1.5 tokens any other."""
    wide = len(_WIDE.findall(text))
    return (len(text) - wide + 2) // 3 + (wide * 3 + 1) // 2


class Upstream:
    """HTTP clients for the model server. `client` streams; the blocking one counts tokens."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        headers = {"accept-encoding": "identity"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        self.url = url
        self.client = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=5.0, pool=30.0),
            limits=httpx2.Limits(
                max_connections=_MAX_CONNECTIONS,
                max_keepalive_connections=64,
                keepalive_expiry=4.0,  # uvicorn drops idle connections after 5 s
            ),
            trust_env=False,
        )
        self._blocking = httpx2.Client(
            base_url=url, headers=headers, timeout=httpx2.Timeout(10.0), trust_env=False
        )
        self._model: ModelInfo | None = None
        self._model_until = 0.0
        self._model_lock = asyncio.Lock()
        self._no_tokenize_until = 0.0

    async def model(self) -> ModelInfo | None:
        """The first model served, remembered for five seconds; None while there is none."""
        if time.monotonic() < self._model_until:
            return self._model
        async with self._model_lock:
            if time.monotonic() >= self._model_until:
                self._model = await self._ask_model()
                kept = _MODEL_SECONDS if self._model else 1.0
                self._model_until = time.monotonic() + kept
        return self._model

    async def _ask_model(self) -> ModelInfo | None:
        try:
            response = await self.client.get("/v1/models", timeout=3.0)
            data = response.json()["data"] if response.status_code == 200 else []
            return _model_info(data[0]) if data else None
        except (httpx2.HTTPError, ValueError, KeyError, TypeError, IndexError):
            return None

    async def require_model(self) -> ModelInfo:
        """The model served; raises ApiError 503 when the server is not there."""
        model = await self.model()
        if model is None:
            raise unavailable()
        return model

    def count_tokens(self, model: ModelInfo, messages: Sequence[dict[str, Any]]) -> int:
        """Tokens of a chat prompt by the upstream's own tokenizer; a cautious guess without one.

        Blocking: for use in worker threads."""
        if time.monotonic() >= self._no_tokenize_until:
            try:
                response = self._blocking.post(
                    "/tokenize", json={"model": model.id, "messages": list(messages)}
                )
                if response.status_code == 200:
                    return int(response.json()["count"])
            except (httpx2.HTTPError, ValueError, KeyError, TypeError):
                pass
            self._no_tokenize_until = time.monotonic() + 60.0
        return sum(estimate_tokens(str(m.get("content") or "")) + 8 for m in messages) + 8

    async def close(self) -> None:
        await self.client.aclose()
        self._blocking.close()


def _model_info(row: dict[str, Any]) -> ModelInfo:
    length = row.get("max_model_len")
    extra = row.get("x_lectern") or {}
    return ModelInfo(
        id=str(row["id"]),
        max_model_len=length if isinstance(length, int) and length > 0 else None,
        untrained=bool(extra.get("untrained", False)),
        has_tokenizer=bool(extra.get("has_tokenizer", True)),
        is_lectern=row.get("owned_by") == "lectern",
    )


def error_of(status: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """What the caller is told about an error answer of the model server.

    A key the model server refuses is the platform's fault, never the caller's. `retry_after` is
    its header of that name."""
    if status in (401, 403):
        return ApiError(
            502,
            "upstream_refused",
            "The model server refused the platform's own key. Tell an administrator.",
        )
    wait = retry_after if retry_after and _SECONDS.fullmatch(retry_after) else _RETRY_AFTER
    headers = {"Retry-After": wait} if status in (429, 503) else {}
    try:
        error = msgspec.json.decode(body)["error"]
        code, param = error.get("code"), error.get("param")
        return ApiError(
            status,
            str(code) if code is not None else "upstream_error",
            str(error["message"]),
            param=str(param) if param is not None else None,
            headers=headers,
        )
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        what = "does not know this address" if status == 404 else f"answered with status {status}"
        code = "not_found" if status == 404 else "upstream_error"
        return ApiError(status, code, f"The model server {what}.", headers=headers)
