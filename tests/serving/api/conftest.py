"""One running server over a fake engine for each kind of folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from serving.tokenizer import Tokenizer
from tests.serving.api.server import Server
from tests.serving.tokenizer import folders

REPLY = "hello 世界😀 "


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = Tokenizer.from_folder(folders.byte_level(tmp_path_factory.mktemp("tokenizer")))
    assert found is not None
    return found


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., Server]]:
    """Start a server; `reply` is text, other options go to the fake engine."""
    with ExitStack() as stack:

        def begin(reply: str = REPLY, *, has_tokenizer: bool = True, **options: Any) -> Server:
            server = Server(
                tokenizer if has_tokenizer else None,
                reply=tokenizer.encode(reply),
                eos=tokenizer.encode("<|im_end|>")[0],
                **options,
            )
            return stack.enter_context(server.running())

        yield begin


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture(scope="session")
def server_once(tokenizer: Tokenizer) -> Iterator[Server]:
    """A server for tests that leave nothing behind."""
    server = Server(tokenizer, reply=tokenizer.encode(REPLY), eos=tokenizer.encode("<|im_end|>")[0])
    with server.running():
        yield server
