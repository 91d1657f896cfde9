"""A server that answers completions with so many tokens, or refuses, fails or breaks off."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Which = Callable[[dict[str, Any]], bool]


def none(body: dict[str, Any]) -> bool:
    return False


class Address:
    """`asked` has headers and body of each completion. By its body one gets 429 (`refused`), an
    error in its stream (`failed`) or a token too few (`cut`)."""

    def __init__(
        self, refused: Which = none, failed: Which = none, cut: Which = none, context: int = 4096
    ) -> None:
        self.refused, self.failed, self.cut, self.context = refused, failed, cut, context
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []

    @contextmanager
    def running(self) -> Iterator[str]:
        """The address."""
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = {"data": [{"id": "far", "max_model_len": ours.context}]}
                self._answer(200, json.dumps(listed).encode(), "application/json")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ours.asked.append((dict(self.headers), body))
                if ours.refused(body):
                    self._answer(429, b'{"error": {"message": "later"}}', "application/json")
                    return
                count = body["max_tokens"]
                events = [{"choices": [{"text": "x"}]} for _ in range(count)]
                usage = {"choices": [], "usage": {"completion_tokens": count - ours.cut(body)}}
                if ours.failed(body):
                    events = [{"error": {"message": "out of order"}}]
                lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, usage]]
                text = "".join([*lines, "data: [DONE]\n\n"])
                self._answer(200, text.encode(), "text/event-stream")

            def _answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Says nothing on the tests' standard error."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
