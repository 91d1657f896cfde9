"""What each rank of a stage holds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from serving.attention import TorchAttention
from serving.layers.place import Place
from serving.layers.share import share, vocabulary_share


class _Ranks:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def places(ranks: int) -> list[Place]:
    groups: list[Any] = [_Ranks(rank, ranks) if ranks > 1 else None for rank in range(ranks)]
    return [Place(torch.float32, torch.device("cpu"), TorchAttention(), group) for group in groups]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_stand_side_by_side_and_cover_everything(ranks: int) -> None:
    parts = [share(96, place, unit=8) for place in places(ranks)]
    assert [row for part in parts for row in part] == list(range(96))
    assert {len(part) for part in parts} == {96 // ranks}


def test_ranks_beyond_the_heads_hold_the_head_that_their_queries_read() -> None:
    """8 query heads read 2 key-value heads; of 4 ranks the first two read the first."""
    assert [share(2 * 16, place, unit=16) for place in places(4)] == [
        range(16), range(16), range(16, 32), range(16, 32),
    ]  # fmt: skip
    for place in places(8):
        (query,) = share(8, place)
        (read,) = share(2, place)
        assert read == query // 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 17, 320, 323, 151_936])
def test_the_vocabulary_is_shared_out_with_equal_room(size: int, ranks: int) -> None:
    shares = [vocabulary_share(size, place) for place in places(ranks)]
    assert [token for part in shares for token in part.tokens] == list(range(size))
    assert len({part.rows for part in shares}) == 1
    assert all(len(part.tokens) <= part.rows for part in shares)
    # Gathered rows are cut after `size`, so tokens must stand where they would stand whole.
    for number, part in enumerate(shares):
        assert part.tokens.start == min(size, number * part.rows)
    assert all(before.tokens.stop == after.tokens.start for before, after in pairwise(shares))
    assert ranks == 1 or shares[0].rows % 16 == 0
