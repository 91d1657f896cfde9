"""The Triton kernels in Triton's interpreter: right in arithmetic and indexing, without a GPU."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from tests.serving.kernels import triton_checks as checks
from tests.serving.kernels.interpreted import interpreted_kernels


@pytest.fixture
def kernels() -> ModuleType:
    return interpreted_kernels()


# The interpreter's products of bfloat16 are wrong, so half precision stands in for it.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "dtype"),
    [
        (4, 2, 64, None, torch.float32),
        (3, 3, 96, 30, torch.float32),
        (5, 1, 128, None, torch.float16),
        (8, 2, 128, 40, torch.float32),
        (2, 1, 256, None, torch.float16),
        (7, 1, 32, 5, torch.float32),
    ],
)
def test_attention(
    kernels: ModuleType, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    checks.check_attention(
        kernels, "cpu", dtype, heads=heads, kv_heads=kv_heads, dim=dim, window=window, seed=dim,
        longest=300,
    )  # fmt: skip


def test_norms_and_gate(kernels: ModuleType) -> None:
    checks.check_tokenwise(kernels, "cpu", torch.float32)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (9, 3, 96), (2, 1, 256)])
def test_rotary(kernels: ModuleType, heads: int, kv_heads: int, dim: int) -> None:
    checks.check_rotary(kernels, "cpu", torch.float32, heads, kv_heads, dim)


def test_pushed_rows(kernels: ModuleType) -> None:
    checks.check_push(kernels, "cpu", torch.float32)


def test_drawing(kernels: ModuleType) -> None:
    checks.check_draw(kernels, "cpu")


def test_shares_cover_every_key_once(kernels: ModuleType) -> None:
    source = np.random.default_rng(0)
    for count, extra, longest in ((1, 1, 9000), (3, 99, 9000), (64, 99, 3000), (900, 450, 2000)):
        lens = source.integers(1, longest, count).astype(np.int32)
        shares, starts = kernels.decode_shares(lens, count + extra)
        assert len(shares) <= count + extra
        assert int(starts[-1]) == len(shares)
        for sequence in range(count):
            own = shares[shares[:, 0] == sequence]
            own = own[own[:, 1].argsort()]
            assert own[0, 1] == 0
            assert own[-1, 2] == lens[sequence]
            assert (own[1:, 1] == own[:-1, 2]).all()
            assert (own[:, 2] > own[:, 1]).all()
            first, last = starts[sequence : sequence + 2]
            parts = [-1] if len(own) == 1 else list(range(first, last))
            assert own[:, 3].tolist() == parts


def test_parts_are_merged_for_several_heads_at_once(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for many sequences; heads are no multiple of a program's, parts fill two rounds."""
    monkeypatch.setattr("serving.kernels.triton.attention.merge_shape", lambda rows: (2, 4))
    checks.check_attention(
        kernels, "cpu", torch.float32, heads=6, kv_heads=2, dim=96, window=None, seed=5, longest=700
    )


@pytest.mark.parametrize(
    ("rows", "columns", "width", "bias"),
    [(1, 64, 256, False), (5, 100, 200, True), (16, 640, 512, True), (17, 72, 1100, False)],
)
def test_skinny_linear(
    kernels: ModuleType, rows: int, columns: int, width: int, bias: bool
) -> None:
    """Split in shares of k, with and without a rest; the last of a block adds in one order."""
    checks.check_skinny_linear(
        kernels, "cpu", torch.float32, rows=rows, columns=columns, width=width, bias=bias
    )
