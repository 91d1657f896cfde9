"""Every kernel against the same mathematics in float64, with native code on and off."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from serving import kernels
from serving.kernels.memory import large_zeros

pytestmark = pytest.mark.usefixtures("mode", "poisoned")


def close(got: Tensor, wanted: Tensor, roundings: float) -> None:
    """Within a few bf16 (or float32) roundings of the float64 value, relative to its scale."""
    step = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}[got.dtype]
    scale = float(wanted.abs().max()) + 1e-30
    worst = float((got.double() - wanted).abs().max())
    assert worst <= roundings * step * scale, (worst, scale)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((m, 96, 64) for m in (1, 2, 5, 7, 13, 14, 15, 16, 17, 28, 29, 43, 100)),
        *((m, n, k) for m, (n, k) in itertools.product((1, 3, 19), ((33, 35), (1, 1), (257, 130)))),
        (16, 1000, 512),
    ],
)
def test_linear(m: int, n: int, k: int, threads: int) -> None:
    x, weight, bias = random(m, k), random(n, k, seed=1), random(n, seed=2)
    wanted = x.double() @ weight.double().T
    linear = kernels.pack_linear(weight.clone())
    close(linear(x), wanted, 1)
    with_bias = kernels.pack_linear(weight.clone(), bias)
    close(with_bias(x), wanted + bias.double(), 2)
    exact = linear.float32(x)
    assert exact.dtype is torch.float32
    close(exact.bfloat16(), wanted, 1)


def test_linear_keeps_float32_sums(mode: str) -> None:
    x, weight = random(7, 512), random(64, 512, seed=1)
    wanted = x.double() @ weight.double().T
    # Plain torch rounds its bf16 products; the native product keeps the sums as they are.
    rounded = wanted.bfloat16().double() if mode == "plain" else wanted
    close(kernels.pack_linear(weight).float32(x), rounded, 1 if mode == "plain" else 4)


def test_linear_float32_is_torch() -> None:
    x = random(5, 64, dtype=torch.float32)
    weight = random(48, 64, dtype=torch.float32, seed=1)
    assert torch.equal(kernels.pack_linear(weight)(x), torch.nn.functional.linear(x, weight))


def test_linear_takes_strided_rows(threads: int) -> None:
    wide, weight = random(9, 128), random(40, 64, seed=1)
    close(
        kernels.pack_linear(weight)(wide[:, 32:96]), wide[:, 32:96].double() @ weight.double().T, 1
    )


@pytest.mark.parametrize(("n", "k"), [(64, 64), (50, 33), (1, 4)])
def test_rows_come_back_unchanged(n: int, k: int) -> None:
    weight = random(n, k)
    ids = torch.tensor([0, n - 1, n // 2, 0])
    linear = kernels.pack_linear(weight.clone())
    assert torch.equal(linear.rows(ids), weight[ids])
    close(linear(random(3, k, seed=5)), random(3, k, seed=5).double() @ weight.double().T, 1)
    with pytest.raises(IndexError):
        linear.rows(torch.tensor([n]))


@pytest.mark.parametrize("width", [64, 1024, 100, 33])
def test_norms(width: int, threads: int) -> None:
    x, residual, weight = random(40, width), random(40, width, seed=1), random(width, seed=2)

    def norm(v: Tensor) -> Tensor:
        return v / torch.sqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()

    close(kernels.rms_norm(x, weight, 1e-6), norm(x.double()), 2)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-6)
    close(total, x.double() + residual.double(), 1)
    close(normed, norm(total.double()), 2)


@pytest.mark.parametrize("width", [64, 3072, 50])
def test_silu_and_mul(width: int, threads: int) -> None:
    x = random(21, 2 * width) * 8
    gate, up = x.double().chunk(2, dim=-1)
    close(kernels.silu_and_mul(x), gate * torch.sigmoid(gate) * up, 2)
    tails = torch.tensor([[-200.0, 200.0, -0.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    close(kernels.silu_and_mul(tails), torch.tensor([[0.0, 200.0, 0.0]], dtype=torch.float64), 1)


def rotated(x: Tensor, angles: Tensor, norm: Tensor | None) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.double()
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("dim", [64, 96, 128, 256, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_write_kv(dim: int, normed: bool, threads: int) -> None:
    tokens, heads, kv_heads, page_size = 9, 6, 2, 16
    fused = random(tokens, (heads + 2 * kv_heads) * dim)
    q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    q, k, v = (x.view(tokens, -1, dim) for x in (q, k, v))
    q_norm, k_norm = (random(dim, seed=1), random(dim, seed=2)) if normed else (None, None)
    angle = torch.arange(40).double().unsqueeze(1) * 10000.0 ** -(
        torch.arange(dim // 2).double() / (dim // 2)
    )
    table = torch.cat((angle.cos(), angle.sin()), dim=-1).float()
    positions = torch.tensor([3, 4, 5, 0, 1, 30, 31, 32, 7])
    slots = torch.tensor([35, 36, 37, 0, 1, 78, 79, 16, -1])
    kv = torch.full((5, 2, page_size, kv_heads, dim), 7.0, dtype=torch.bfloat16)
    got = kernels.rotary_and_write_kv(
        q, k, v, table, positions, kv, slots, page_size, q_norm=q_norm, k_norm=k_norm, eps=1e-6
    )
    close(got, rotated(q, angle[positions], q_norm), 4)
    expected = rotated(k, angle[positions], k_norm)
    flat = kv.transpose(1, 2).reshape(-1, 2, kv_heads, dim)
    close(flat[slots[:-1], 0], expected[:-1], 4)
    assert torch.equal(flat[slots[:-1], 1], v[:-1])
    untouched = torch.ones(flat.shape[0], dtype=torch.bool)
    untouched[slots[:-1]] = False
    assert bool((flat[untouched] == 7).all())


def attended(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """q: [n, Hq, D] newest of keys [L, Hkv, D]; float64."""
    n, length = q.shape[0], keys.shape[0]
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q.double(), keys.double()) * scale
    at = torch.arange(length - n, length).unsqueeze(1)
    seen = torch.arange(length).unsqueeze(0)
    hidden = seen > at
    if window is not None:
        hidden |= seen <= at - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values.double())


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "window", "page_size"),
    [
        (64, 4, 4, None, 16),
        (64, 8, 1, 20, 5),
        (96, 6, 2, None, 5),
        (96, 4, 4, 300, 16),
        (128, 4, 2, None, 16),
        (128, 8, 1, 1, 16),
        (128, 6, 2, 20, 5),
        (128, 4, 4, 300, 40),
        (256, 6, 2, 20, 16),
        (256, 8, 1, None, 5),
        (192, 4, 2, 300, 5),
        (32, 4, 4, 20, 16),
        (80, 6, 2, 20, 16),
    ],
)
def test_paged_attention(
    dim: int, heads: int, kv_heads: int, window: int | None, page_size: int, threads: int
) -> None:
    lengths = [1, 17, 48, 333, 16, 20, 70, 300, 290]
    counts = [1, 1, 1, 1, 1, 20, 3, 300, 33]
    starts = [0, *itertools.accumulate(counts)]
    widest = max(-(-length // page_size) for length in lengths)
    generator = torch.Generator().manual_seed(dim + heads)
    pages = torch.randperm(len(lengths) * widest + 3, generator=generator).to(torch.int32)
    tables = pages[: len(lengths) * widest].view(len(lengths), widest).clone()
    kv = torch.zeros(pages.numel(), 2, page_size, kv_heads, dim, dtype=torch.bfloat16)
    q = random(starts[-1], heads, dim)
    wanted = []
    for s, length in enumerate(lengths):
        keys, values = (random(length, kv_heads, dim, seed=2 * s + i) for i in (0, 1))
        at = torch.arange(length)
        kv[tables[s, at // page_size].long(), 0, at % page_size] = keys
        kv[tables[s, at // page_size].long(), 1, at % page_size] = values
        used = -(-length // page_size)
        tables[s, used:] = -1
        kv[tables[s, used - 1], :, (length - 1) % page_size + 1 :] = 1e30  # stale, never seen
        wanted.append(attended(q[starts[s] : starts[s + 1]], keys, values, dim**-0.5, window))
    got = kernels.paged_attention(
        q,
        kv,
        query_starts=starts,
        context_lens=lengths,
        page_tables=tables,
        page_size=page_size,
        scale=dim**-0.5,
        sliding_window=window,
    )
    for s, expected in enumerate(wanted):
        close(got[starts[s] : starts[s + 1]], expected, 3)


def test_large_zeros() -> None:
    for shape in [(3, 5), (1 << 20, 3), ((1 << 20) + 1,)]:
        tensor = large_zeros(shape, torch.bfloat16)
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert not bool(tensor.any())
        tensor.fill_(1)
        assert float(tensor.view(-1)[-1]) == 1
        if tensor.numel() * 2 >= 2 << 20:
            assert tensor.data_ptr() % (2 << 20) == 0
