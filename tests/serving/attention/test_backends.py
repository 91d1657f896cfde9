"""Every attention backend against attention written out token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.attention import AttentionBackend, KernelAttention, TorchAttention
from tests.serving.paged import step_inputs

BACKENDS = {"torch": TorchAttention(), "kernel": KernelAttention()}


def _naive(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """q: [n, Hq, D], the newest of keys and values [L, Hkv, D]."""
    out = torch.empty_like(q)
    share = q.shape[1] // keys.shape[1]
    for row in range(q.shape[0]):
        end = keys.shape[0] - q.shape[0] + row + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(q.shape[1]):
            k, v = keys[begin:end, head // share], values[begin:end, head // share]
            out[row, head] = torch.softmax((k @ q[row, head]) * scale, dim=0) @ v
    return out


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch_equals_attention_written_out(name: str, data: st.DataObject) -> None:
    backend: AttentionBackend = BACKENDS[name]
    decodes = data.draw(st.integers(0, 3))
    prefills = data.draw(st.integers(0 if decodes else 1, 2))
    page_size = data.draw(st.sampled_from([4, 16]))
    kv_heads, share = data.draw(st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 7)]))
    window = data.draw(st.none() | st.integers(1, 30))
    contexts = [data.draw(st.integers(1, 50)) for _ in range(decodes + prefills)]
    counts = [1] * decodes + [data.draw(st.integers(1, n)) for n in contexts[decodes:]]
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dim, scale = 8, 0.3

    # What no sequence owns is filled with values that would spoil any unmasked sum.
    pages = 64
    kv = torch.full((pages, 2, page_size, kv_heads, dim), torch.nan)
    free = torch.randperm(pages).tolist()
    tables = [[free.pop() for _ in range(-(-n // page_size))] for n in contexts]
    held = [torch.randn(2, n, kv_heads, dim) for n in contexts]
    for table, (keys, values), n in zip(tables, held, contexts, strict=True):
        at = torch.arange(n)
        page = torch.tensor(table)[at // page_size]
        kv[page, 0, at % page_size], kv[page, 1, at % page_size] = keys, values
    inputs = step_inputs([[0] * n for n in counts], contexts, tables, page_size)
    inputs.num_decodes = decodes
    q = torch.randn(sum(counts), kv_heads * share, dim)

    out = backend.forward(q, kv, inputs, scale=scale, sliding_window=window, layer=0)

    start = 0
    for count, (keys, values) in zip(counts, held, strict=True):
        expected = _naive(q[start : start + count], keys, values, scale, window)
        torch.testing.assert_close(out[start : start + count], expected, atol=1e-5, rtol=1e-4)
        start += count


def test_write_kv_puts_rows_where_the_slots_say() -> None:
    kv = torch.zeros(6, 2, 4, 2, 8)
    inputs = step_inputs([[1], [2, 3, 4]], [6, 3], [[5, 2], [0]], page_size=4)
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    TorchAttention().write_kv(k, v, kv, inputs)
    assert torch.equal(kv[2, 0, 1], k[0])
    assert torch.equal(kv[2, 1, 1], v[0])
    assert torch.equal(kv[0, 0, :3], k[1:])
    assert torch.equal(kv[0, 1, :3], v[1:])
    assert int(kv.count_nonzero()) == k.numel() + v.numel()
