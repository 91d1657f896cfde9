"""The Triton kernels in Triton's interpreter: right in arithmetic and indexing, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch

from tests.serving.kernels import triton_checks as checks

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or "triton" not in sys.modules
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Read when triton is imported first, which must not have happened before.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def kernels() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; its interpreter cannot run the kernels")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; test_triton_gpu.py runs the compiled kernels on it")
    if not _INTERPRETED:
        pytest.skip("triton was imported before its interpreter could be switched on")
    import serving.kernels.triton

    return serving.kernels.triton


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


def test_drawing(kernels: ModuleType) -> None:
    checks.check_draw(kernels, "cpu")
