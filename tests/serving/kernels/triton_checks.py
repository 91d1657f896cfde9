"""What the Triton kernels must do, on random shapes: in the interpreter here, compiled on a GPU.

Every result is compared with `serving.kernels.reference` in float64 by the relative norm of the
difference. Memory that nobody may read holds NaN.
"""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from serving.kernels import reference
from serving.sampling.draw import draw

PAGE = 16


def close(out: Tensor, expected: Tensor, bound: float) -> None:
    out, expected = out.double().cpu(), expected.double().cpu()
    error = float((out - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error < bound, f"relative error {error:.1e}, allowed {bound:.0e}"


def bound_of(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def check_attention(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    seed: int,
    longest: int = 120,
) -> None:
    """A batch of decodes and prefills with prefixes, pages scattered, with and without splits."""
    draws = random.Random(seed)
    torch.manual_seed(seed)
    decodes, prefills = draws.randint(1, 3), draws.randint(1, 2)
    lens = [draws.randint(1, longest) for _ in range(decodes + prefills)]
    counts = [1] * decodes + [draws.randint(1, n) for n in lens[decodes:]]
    pages = sum(-(-n // PAGE) for n in lens) + 3
    kv = torch.full((pages, 2, PAGE, kv_heads, dim), torch.nan, dtype=torch.float64)
    free = torch.randperm(pages).tolist()
    # Rows of the table lie in another order than the sequences.
    rows = torch.randperm(len(lens) + 2)[: len(lens)]
    tables = torch.full((len(lens) + 2, longest // PAGE + 2), -7, dtype=torch.int32)
    for row, n in zip(rows.tolist(), lens, strict=True):
        own = [free.pop() for _ in range(-(-n // PAGE))]
        tables[row, : len(own)] = torch.tensor(own)
        at = torch.arange(n)
        kv[torch.tensor(own)[at // PAGE], :, at % PAGE] = torch.randn(n, 2, kv_heads, dim).double()
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    kv = kv.to(dtype).double()
    q = torch.randn(int(starts[-1]), heads, dim).to(dtype).double()
    expected = reference.paged_attention(
        q, kv, query_starts=starts.tolist(), context_lens=lens, page_tables=tables[rows],
        page_size=PAGE, scale=dim**-0.5, sliding_window=window,
    )  # fmt: skip

    on = {"device": device}
    q, kv = q.to(dtype).to(device), kv.to(dtype).to(device)
    lens_tensor = torch.tensor(lens, dtype=torch.int32, **on)
    common = {
        "page_tables": tables.to(device),
        "table_rows": rows.to(torch.int32).to(device),
        "scale": dim**-0.5,
        "sliding_window": window,
    }
    shape = kernels.decode_shape(dim, dtype)
    for room in (decodes + 1, decodes + 4):
        out = torch.full_like(q, torch.nan)
        shares, part_starts = kernels.decode_shares(np.array(lens[:decodes], np.int32), room)
        assert len(shares) <= room
        padding = np.full((2, 4), -1, dtype=np.int32)
        kernels.paged_decode(
            q, kv, lens=lens_tensor, shape=shape, out=out,
            shares=torch.from_numpy(np.concatenate((shares, padding))).to(device),
            part_starts=torch.from_numpy(part_starts).to(device), **common,
        )  # fmt: skip
        close(out[:decodes], expected[:decodes], bound_of(dtype))
        # Rows of other sequences stay as they are.
        assert out[decodes:].isnan().all()
    tile_shape = kernels.prefill_shape(heads, kv_heads, dim, dtype)
    tiles = kernels.prefill_tiles(
        starts, np.array(lens, dtype=np.int32), decodes, tile_shape.tokens(heads, kv_heads)
    )
    empty = np.full((1, 2), -1, dtype=np.int32)
    kernels.paged_prefill(
        q, kv, query_starts=torch.from_numpy(starts).to(device), context_lens=lens_tensor,
        tiles=torch.from_numpy(np.concatenate((tiles, empty))).to(device), shape=tile_shape,
        out=out, **common,
    )  # fmt: skip
    close(out, expected, bound_of(dtype))


def check_tokenwise(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    """Norms and gate of widths that fill no block."""
    torch.manual_seed(3)
    for rows, width in ((1, 64), (5, 200), (3, 1100)):
        x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        weight = torch.randn(width).to(dtype)
        moved = [t.to(device) for t in (x, residual, weight)]
        close(
            kernels.rms_norm(moved[0], moved[2], 1e-6),
            reference.rms_norm(x.double(), weight.double(), 1e-6),
            bound_of(dtype),
        )
        normed, total = kernels.add_rms_norm(*moved, 1e-6)
        expected = reference.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total.cpu(), expected[1])
        close(normed, expected[0], bound_of(dtype))
        pair = torch.cat((x, residual), dim=1)
        close(
            kernels.silu_and_mul(pair.to(device)),
            reference.silu_and_mul(pair.double()),
            bound_of(dtype),
        )


def check_rotary(
    kernels: ModuleType, device: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    """Views of one fused product; one token has no slot; with and without norms."""
    torch.manual_seed(dim)
    tokens, pages = 5, 4
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.randn(50, dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([0, 49, 7, 7, 20])
    slots = torch.tensor([3, PAGE, -1, 3 * PAGE + 15, 2])
    gains = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype))
    for norms in (None, gains):
        results = []
        for where, functions in (("cpu", reference), (device, kernels)):
            kv = torch.full((pages, 2, PAGE, kv_heads, dim), 9.0, dtype=dtype, device=where)
            q, k, v = fused.to(where).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
            out = functions.rotary_and_write_kv(
                q.view(tokens, heads, dim), k.view(tokens, kv_heads, dim),
                v.view(tokens, kv_heads, dim), cos_sin.to(where), positions.to(where), kv,
                slots.to(where), PAGE,
                q_norm=None if norms is None else norms[0].to(where),
                k_norm=None if norms is None else norms[1].to(where),
            )  # fmt: skip
            results.append((out, kv))
        close(results[1][0], results[0][0], bound_of(dtype))
        close(results[1][1], results[0][1], bound_of(dtype))
        untouched = results[0][1] == 9.0
        assert (results[1][1].cpu()[untouched] == 9.0).all()


def check_draw(kernels: ModuleType, device: str, vocab: int = 5000) -> None:
    """Sampled rows agree with the sampler's inverse CDF, greedy rows with argmax."""
    torch.manual_seed(1)
    rows = 12
    logits = torch.randn(rows, vocab) * 4
    logits[3, 100:] = -torch.inf
    logits[4] = 0.5  # all alike: the first one is the greedy choice
    temperature = torch.rand(rows) * 1.5 + 0.2
    temperature[[2, 4, 7]] = 0.0
    uniform = torch.rand(rows, dtype=torch.float64)
    uniform[5], uniform[6] = 1 - 2.0**-53, 2.0**-54
    warm = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    expected = draw(torch.softmax(logits / warm, -1), uniform)
    # At the very end of the distribution rounding decides; any token of the last mass will do.
    loose = 5
    expected = torch.where(temperature > 0, expected, logits.argmax(-1))
    last = torch.full((20,), -1, dtype=torch.int32, device=device)
    out = torch.full((rows,), -1, dtype=torch.int32, device=device)
    slots = torch.randperm(20)[:rows].to(torch.int32)
    kernels.draw_tokens(
        logits.to(device), temperature.to(device), uniform.to(device), slots.to(device), last, out
    )
    assert (torch.softmax(logits[loose] / warm[loose], -1)[int(out[loose]) + 1 :]).sum() < 1e-5
    expected[loose] = int(out[loose])
    assert out.tolist() == expected.tolist()
    assert last.cpu()[slots.long()].tolist() == expected.tolist()
    assert int((last == -1).sum()) == 20 - rows
    ids = torch.tensor([5, -1 - int(slots[3]), 0, -1 - int(slots[0])], dtype=torch.int32)
    resolved = kernels.resolve_tokens(ids.to(device), last)
    assert resolved.tolist() == [5, int(expected[3]), 0, int(expected[0])]
    kernels.keep_tokens(
        slots[2:5].to(device), torch.arange(7, 10, dtype=torch.int32).to(device), last
    )
    assert last.cpu()[slots[2:5].long()].tolist() == [7, 8, 9]
    assert last.cpu()[slots[5:].long()].tolist() == expected[5:].tolist()


def check_push(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    """Whole pages and rows of tokens, of powers of two and others; nothing beside them changes."""
    torch.manual_seed(0)
    for kv_heads, dim in ((2, 64), (3, 96), (1, 32)):
        source = torch.randn(9, 2, 4, kv_heads, dim).to(dtype).to(device)
        pages, row = source[0].numel(), kv_heads * dim
        for length, numbers in ((pages, [7, 0, 3]), (row, [*range(5, 70, 3)]), (row, [])):
            target = torch.zeros_like(source)
            starts = torch.tensor(numbers, dtype=torch.int64) * length
            kernels.push_rows(source, target.data_ptr(), starts.to(device), length)
            expected = torch.zeros_like(source).view(-1, length)
            expected[numbers] = source.view(-1, length)[numbers]
            assert torch.equal(target.view(-1, length), expected)


def check_skinny_linear(
    kernels: ModuleType, device: str, dtype: torch.dtype, *, rows: int, columns: int, width: int,
    bias: bool,
) -> None:  # fmt: skip
    """Twice, since the counters of split products must be back at zero; rows have a stride."""
    torch.manual_seed(rows + columns)
    x = torch.randn(rows, width + 16, dtype=torch.float64)[:, :width]
    weight = torch.randn(columns, width, dtype=torch.float64) / width**0.5
    offset = torch.randn(columns, dtype=torch.float64) if bias else None
    here = [None if part is None else part.to(dtype).to(device) for part in (x, weight, offset)]
    expected = torch.nn.functional.linear(*(None if p is None else p.double() for p in here))
    first = kernels.skinny_linear(*here)
    second = kernels.skinny_linear(*here)
    close(first, expected, bound_of(dtype))
    assert torch.equal(first, second)
