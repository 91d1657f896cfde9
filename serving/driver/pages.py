"""The page pool and the prefix cache.

A page is in one of three states: *free* (holds nothing), *cached* (nobody uses it, its tokens are
known, so a new prompt may), *in use* (one or more sequences hold it). Free + cached + in use is
always all pages. Who holds a page is counted; a page returns when its last holder lets go, and the
scheduler lets go only when no micro-batch in flight names the page.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from struct import iter_unpack

import numpy as np
from numpy.typing import NDArray

from serving.core import Page


def chain_start(salt: str) -> bytes:
    """The key from which a prompt's chain of page keys starts."""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"lectern-salt").digest()


def extend_chain(
    keys: list[bytes], tokens: NDArray[np.int32], salt: str, page_size: int, num_pages: int
) -> None:
    """Append keys until `keys` covers the first `num_pages` pages of `tokens`.

    The key of a page is the hash of its predecessor's key and its own tokens (int32 bytes).
    """
    have = len(keys)
    if have >= num_pages:
        return
    parent = keys[-1] if keys else chain_start(salt)
    blake2b = hashlib.blake2b
    for chunk in page_chunks(tokens, page_size, have, num_pages):
        parent = blake2b(parent + chunk, digest_size=16).digest()
        keys.append(parent)


def page_chunks(tokens: NDArray[np.int32], page_size: int, first: int, end: int) -> Iterator[bytes]:
    """The tokens (int32 bytes) of each of the pages `first` to `end` - 1."""
    data = tokens[first * page_size : end * page_size].tobytes()
    return map(itemgetter(0), iter_unpack(f"{page_size * tokens.itemsize}s", data))


class PagePool:
    """Pages 0 to num_pages - 1, their holders, and the prefix cache over them.

    `evict_fifo` evicts in the order of registration; otherwise the page that has been unused for
    longest goes first.
    """

    def __init__(self, num_pages: int, page_size: int, *, evict_fifo: bool = False) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._evict_fifo = evict_fifo
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._registered: dict[bytes, Page] = {}
        self._page_of: list[Page | None] = [None] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Only of use to evict by registration:
        self._registrations = 0
        self._registered_at: dict[int, int] = {}
        self._oldest: list[tuple[int, int]] = []  # heap of (registration, page), may be outdated

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, evicting cached ones if need be; None if there are too few."""
        if count > self.num_available:
            return None
        free, holders = self._free, self._holders
        from_free = min(count, len(free))
        pages = free[len(free) - from_free :]
        pages.reverse()
        del free[len(free) - from_free :]
        if count > from_free:
            pages += self._evict(count - from_free)
        for page in pages:
            holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Become one more holder of cached or used pages, as after a prefix hit."""
        holders = self._holders
        for page in pages:
            if not holders[page]:
                del self._cached[page]
            holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, given in sequence order; the tail becomes evictable before the head."""
        holders, findable = self._holders, self._page_of
        cached, free = self._cached, self._free
        for page in reversed(pages):
            left = holders[page] = holders[page] - 1
            if left > 0:
                continue
            if left < 0:
                raise AssertionError(f"page {page} was released more often than held")
            if findable[page] is None:
                free.append(page)
            else:
                cached[page] = None
                if self._evict_fifo:
                    heapq.heappush(self._oldest, (self._registered_at[page], page))

    def register(
        self, pages: Iterable[int], keys: Iterable[bytes], chunks: Iterable[bytes]
    ) -> None:
        """Make full, written pages findable, each by its key and with its tokens (int32 bytes).

        A second page of equal content stays unfindable.
        """
        registered, page_of = self._registered, self._page_of
        for number, key, chunk in zip(pages, keys, chunks, strict=True):
            if page_of[number] is not None:
                continue
            page = Page(number, key, chunk)
            if registered.setdefault(key, page) is not page:
                continue
            page_of[number] = page
            if self._evict_fifo:
                self._registered_at[number] = self._registrations
                self._registrations += 1

    def lookup(self, keys: Sequence[bytes], tokens: NDArray[np.int32]) -> list[int]:
        """The longest run of registered pages that starts `tokens`, whose page keys are `keys`.

        Changes nothing: call `hold` to keep the pages.
        """
        pages: list[int] = []
        registered = self._registered
        if not keys or keys[0] not in registered:
            return pages
        chunks = page_chunks(tokens, self.page_size, 0, len(keys))
        for key, chunk in zip(keys, chunks, strict=True):
            page = registered.get(key)
            if page is None or page.tokens != chunk:
                break
            pages.append(page.number)
        return pages

    def covered(self, keys: Sequence[bytes], most: int, known: int) -> int:
        """About how many of the first `most` keys are registered in one run from the start.

        `known` is what was found last time; only its end is looked at again, so this is cheap. For
        orders and predictions: `lookup` says what is true.
        """
        count = min(known, most)
        registered = self._registered
        while count and keys[count - 1] not in registered:
            count -= 1
        while count < most and keys[count] in registered:
            count += 1
        return count

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds, so that holding them makes fewer available."""
        holders = self._holders
        return [holders[page] for page in pages].count(0)

    def held(self) -> list[int]:
        """Pages that hold anything: cached or in use."""
        free = set(self._free)
        return [page for page in range(self.num_pages) if page not in free]

    def forget(self) -> None:
        """What the pages held is lost: nothing can be found any more. Holders keep their pages."""
        self._free += self._cached
        self._cached.clear()
        self._registered.clear()
        self._page_of = [None] * self.num_pages
        self._registered_at.clear()
        self._oldest.clear()

    def check(self) -> None:
        """Assert the invariant free + cached + in use == all."""
        states = np.zeros(self.num_pages, dtype=np.int32)
        states[self._free] += 1
        states[list(self._cached)] += 1
        states[np.array(self._holders) > 0] += 1
        if not (states == 1).all():
            raise AssertionError(f"pages in no or two states: {np.flatnonzero(states != 1)[:10]}")
        if self._registered.keys() != {page.key for page in self._page_of if page}:
            raise AssertionError("the prefix cache disagrees with its index")

    def _evict(self, count: int) -> list[int]:
        """Make so many cached pages unfindable, for another use."""
        page_of, registered, least_recent = self._page_of, self._registered, self._cached.popitem
        numbers = []
        for _ in range(count):
            number = self._first_registered() if self._evict_fifo else least_recent(last=False)[0]
            page = page_of[number]
            if page is None:
                raise AssertionError(f"page {number} is cached, but nobody can find it")
            page_of[number] = None
            del registered[page.key]
            numbers.append(number)
        return numbers

    def _first_registered(self) -> int:
        """Take out the cached page that was registered first."""
        registration, number = heapq.heappop(self._oldest)
        while number not in self._cached or self._registered_at[number] != registration:
            registration, number = heapq.heappop(self._oldest)
        del self._cached[number]
        del self._registered_at[number]
        return number
