"""Token ids of recorded prompts, and what a cache of prefixes would leave of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from serving.traces.recorded import BLOCK, Recorded

#: The first and last ids of a vocabulary, often special ones, are in no random prompt.
_MARGIN = 100


def prompt_tokens(one: Recorded, index: int, vocab_size: int, seed: int) -> NDArray[np.int32]:
    """Ids (int32) of a request's prompt: its own, or drawn by the seed.

    Equal blocks give equal ids; a prompt without blocks begins like no other, by its index.
    """
    if one.prompt is not None:
        return one.prompt
    if not one.blocks:
        return _drawn(one.tokens_in, vocab_size, [seed, 1, index])
    parts = [_drawn(BLOCK, vocab_size, [seed, 2, block]) for block in one.blocks]
    return np.concatenate(parts)[: one.tokens_in]


def uncached_tokens(requests: Sequence[Recorded], page_size: int = 16) -> NDArray[np.int64]:
    """Tokens of each prompt that no earlier one begins with, at least 1, in the order given.

    That is what a prefix cache that never forgets leaves to be computed: by block where a trace has
    blocks, by KV page of the engine where it has token ids.
    """
    seen: set[int | bytes] = set()
    left = np.empty(len(requests), dtype=np.int64)
    for place, one in enumerate(requests):
        covered, hit = 0, True
        for key, tokens in _keys(one, page_size):
            hit = hit and key in seen
            covered += tokens if hit else 0
            seen.add(key)
        left[place] = max(1, one.tokens_in - covered)
    return left


def _keys(one: Recorded, page_size: int) -> Iterator[tuple[int | bytes, int]]:
    """Keys of a prompt's blocks, each telling all tokens up to its end, and the tokens in each."""
    for place, block in enumerate(one.blocks):
        yield block, min(BLOCK, one.tokens_in - place * BLOCK)
    if one.prompt is None:
        return
    chain = hashlib.blake2b(digest_size=16)
    for start in range(0, len(one.prompt) - page_size + 1, page_size):
        chain.update(one.prompt[start : start + page_size].tobytes())
        yield chain.digest(), page_size


def _drawn(count: int, vocab_size: int, seed: list[int]) -> NDArray[np.int32]:
    random = np.random.default_rng(seed)
    return random.integers(_MARGIN, vocab_size - _MARGIN, count, dtype=np.int32)
