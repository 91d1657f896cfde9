"""The Triton kernels compiled, on a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.serving.kernels import triton_checks as checks
from tests.serving.kernels.interpreted import compiled_kernels

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels() -> ModuleType:
    return compiled_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 8), (8, 1), (5, 1), (32, 8)])
def test_attention(
    kernels: ModuleType, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    for seed in range(3):
        checks.check_attention(
            kernels, "cuda", dtype, heads=heads, kv_heads=kv_heads, dim=dim, window=window,
            seed=seed, longest=400,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_pushed_rows(kernels: ModuleType, dtype: torch.dtype) -> None:
    checks.check_push(kernels, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gate(kernels: ModuleType, dtype: torch.dtype) -> None:
    checks.check_tokenwise(kernels, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (9, 3, 96), (32, 8, 128)])
def test_rotary(
    kernels: ModuleType, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    checks.check_rotary(kernels, "cuda", dtype, heads, kv_heads, dim)


@pytest.mark.parametrize("vocab", [100, 5000, 151_936])
def test_drawing(kernels: ModuleType, vocab: int) -> None:
    checks.check_draw(kernels, "cuda", vocab)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 32])
@pytest.mark.parametrize(
    ("columns", "width"), [(96, 64), (4096, 4096), (5120, 25600), (6144, 4096), (20000, 1000)]
)
def test_skinny_linear(
    kernels: ModuleType, dtype: torch.dtype, rows: int, columns: int, width: int
) -> None:
    for bias in (False, True):
        checks.check_skinny_linear(
            kernels, "cuda", dtype, rows=rows, columns=columns, width=width, bias=bias
        )


def test_linear_takes_the_skinny_kernel_for_few_rows(kernels: ModuleType) -> None:
    from serving.kernels import pack_linear

    weight = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    packed = pack_linear(weight.clone())
    for rows in (1, kernels.MOST_ROWS, kernels.MOST_ROWS + 1):
        x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
        checks.close(packed(x), x.double() @ weight.double().T, checks.bound_of(torch.bfloat16))
