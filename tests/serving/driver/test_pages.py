from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from serving.driver.pages import PagePool, chain_start, extend_chain, page_chunks

SIZE = 4


def keys_of(tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_chain(keys, np.array(tokens, dtype=np.int32), salt, SIZE, len(tokens) // SIZE)
    return keys


def register(pool: PagePool, pages: list[int], tokens: list[int], salt: str = "") -> None:
    keys, array = keys_of(tokens, salt), np.array(tokens, dtype=np.int32)
    pool.register(pages[: len(keys)], keys, page_chunks(array, SIZE, 0, len(keys)))


def look(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    return pool.lookup(keys_of(tokens, salt), np.array(tokens, dtype=np.int32))


def taken(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def test_allocate_takes_all_or_nothing() -> None:
    pool = PagePool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert sorted(taken(pool, 3)) == [0, 1, 2]
    assert pool.allocate(1) is None


def test_released_pages_are_found_again_and_shared() -> None:
    pool = PagePool(4, SIZE)
    pages = taken(pool, 2)
    register(pool, pages, list(range(8)))
    pool.release(pages)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 2, 0)
    hits = look(pool, list(range(12)))
    assert hits == pages
    pool.hold(hits)
    pool.hold(hits)
    pool.release(hits)
    assert pool.num_used == 2
    pool.release(hits)
    assert pool.num_cached == 2
    pool.check()


def test_the_chain_ends_at_the_first_difference_and_with_the_salt() -> None:
    pool = PagePool(4, SIZE)
    pages = taken(pool, 2)
    register(pool, pages, list(range(8)))
    assert look(pool, [0, 1, 2, 3, 4, 5, 6, 9]) == pages[:1]
    assert look(pool, [9, 1, 2, 3, 4, 5, 6, 7]) == []
    assert look(pool, list(range(8)), salt="other course") == []
    assert chain_start("a") != chain_start("b")


def test_a_hit_compares_tokens_not_only_keys() -> None:
    pool = PagePool(2, SIZE)
    pages = taken(pool, 1)
    other = np.array([5, 6, 7, 8], "<i4").tobytes()
    pool.register(pages[:1], keys_of([1, 2, 3, 4]), [other])
    assert look(pool, [1, 2, 3, 4]) == []


def test_lru_evicts_what_was_unused_longest_and_tails_before_heads() -> None:
    pool = PagePool(4, SIZE)
    first, second = taken(pool, 2), taken(pool, 2)
    register(pool, first, list(range(8)))
    register(pool, second, list(range(100, 108)))
    pool.release(second)
    pool.release(first)
    assert taken(pool, 1) == [second[1]]
    assert taken(pool, 1) == [second[0]]
    assert taken(pool, 1) == [first[1]]
    assert look(pool, list(range(8))) == first[:1]


def test_fifo_evicts_what_was_registered_first() -> None:
    pool = PagePool(4, SIZE, evict_fifo=True)
    first, second = taken(pool, 2), taken(pool, 2)
    register(pool, first, list(range(8)))
    register(pool, second, list(range(100, 108)))
    pool.release(second)
    pool.release(first)
    pool.hold(first)
    pool.release(first)
    assert taken(pool, 1) == [first[0]]
    pool.check()


@pytest.mark.parametrize("fifo", [False, True])
def test_what_is_forgotten_is_not_found_and_every_page_is_of_use_again(fifo: bool) -> None:
    pool = PagePool(4, SIZE, evict_fifo=fifo)
    cached, held = taken(pool, 2), taken(pool, 1)
    register(pool, cached, list(range(8)))
    register(pool, held, list(range(100, 104)))
    pool.release(cached)
    pool.forget()
    pool.check()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 1)
    assert not look(pool, list(range(8)))
    pool.release(held)
    assert pool.num_free == 4
    again = taken(pool, 4)
    register(pool, again, list(range(8)))
    pool.release(again)
    assert sorted(taken(pool, 4)) == [0, 1, 2, 3]


def test_releasing_twice_is_an_error() -> None:
    pool = PagePool(2, SIZE)
    pages = taken(pool, 1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(pages)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes, get registered and go; no page is ever lost or doubled."""

    held: Bundle[tuple[tuple[int, ...], tuple[int, ...]]] = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE, evict_fifo=False)
        self.holders: dict[int, int] = {}
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(target=held, pages=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def arrive(self, pages: list[int]) -> object:
        tokens = [token for page in pages for token in [page] * SIZE]
        hits = look(self.pool, tokens)
        for index, page in enumerate(hits):
            assert self.content[page] == tuple(tokens[: (index + 1) * SIZE])
        count = len(pages) - len(hits)
        before = self.pool.num_available
        if count + self.pool.num_unused(hits) > before:
            return multiple()
        self.pool.hold(hits)
        fresh = self.pool.allocate(count)
        assert fresh is not None
        for page in hits + fresh:
            self.holders[page] = self.holders.get(page, 0) + 1
        assert all(self.holders[page] == 1 for page in fresh), "a page in use was handed out"
        for page in fresh:
            self.content.pop(page, None)
        return (tuple(hits + fresh), tuple(tokens))

    @rule(sequence=held)
    def written(self, sequence: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        pages, tokens = sequence
        register(self.pool, list(pages), list(tokens))
        for index, page in enumerate(pages):
            self.content.setdefault(page, tokens[: (index + 1) * SIZE])

    @rule(sequence=consumes(held))
    def leave(self, sequence: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        for page in sequence[0]:
            self.holders[page] -= 1
        self.pool.release(list(sequence[0]))

    @invariant()
    def every_page_is_in_one_state(self) -> None:
        self.pool.check()
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == 12
        assert self.pool.num_used == sum(1 for count in self.holders.values() if count)


class FifoPoolMachine(PoolMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE, evict_fifo=True)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFifoPool = FifoPoolMachine.TestCase
TestFifoPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
