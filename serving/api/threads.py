"""Keeping the event loop free while a long text is tokenised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

#: Characters from which a thread is worth its cost: about two milliseconds of tokenising.
LONG_TEXT = 8_000

T = TypeVar("T")


async def in_thread_if_long(size: int, work: Callable[[], T]) -> T:
    """Run `work` here, or in a thread when it goes over many characters."""
    if size < LONG_TEXT:
        return work()
    return await asyncio.to_thread(work)
