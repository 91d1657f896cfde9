"""FlashInfer's prefills: what is handed over, when they are chosen, and on a GPU what comes out."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from serving.attention.flashinfer_paged import FlashInferPrefill, _layout
from serving.errors import ConfigError
from serving.stage.gpu import prefill
from serving.stage.gpu.prefill import long_prefills


def test_pages_are_listed_without_gaps() -> None:
    tables = np.array([[7, 8, 9, -1], [3, -1, -1, -1], [5, 6, 1, 2]], dtype=np.int32)
    starts, pages, last = _layout(np.array([33, 16, 64], dtype=np.int32), tables, 16)
    assert starts.tolist() == [0, 3, 4, 8]
    assert pages.tolist() == [7, 8, 9, 3, 5, 6, 1, 2]
    assert last.tolist() == [1, 16, 16]


def choose(asked: str, **changes: object) -> object:
    settings: dict[str, object] = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "page_size": 16,
        "dtype": torch.bfloat16, "windowed": False,
    }  # fmt: skip
    return long_prefills(asked, torch.device("cpu"), **(settings | changes))  # type: ignore[arg-type]


def test_our_own_kernels_need_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "flashinfer_installed", lambda: False)
    assert choose("triton") is None
    assert choose("auto") is None
    with pytest.raises(ConfigError, match=r"not installed.*--attention triton"):
        choose("flashinfer")


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"head_dim": 96}, {"windowed": True}])
def test_what_the_package_cannot_serve(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "flashinfer_installed", lambda: True)
    assert choose("auto", **change) is None
    with pytest.raises(ConfigError, match="it serves bfloat16"):
        choose("flashinfer", **change)


@pytest.mark.parametrize(("theirs", "ours", "taken"), [(0.3, 0.4, True), (0.4, 0.3, False)])
def test_the_faster_one_is_taken(
    theirs: float, ours: float, taken: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(prefill, "flashinfer_installed", lambda: True)
    monkeypatch.setattr(prefill, "FlashInferPrefill", lambda *_, **__: object())
    monkeypatch.setattr(prefill, "_measure", lambda *_, **__: (theirs, ours))
    assert (choose("auto") is not None) is taken
    assert f"use {'flashinfer' if taken else 'triton'}" in capsys.readouterr().err
    assert choose("flashinfer") is not None


def test_a_failed_start_is_no_disaster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(prefill, "flashinfer_installed", lambda: True)
    monkeypatch.setattr(prefill, "FlashInferPrefill", fails)
    assert choose("auto") is None
    assert "it failed to start: no compiler" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no compiler"):
        choose("flashinfer")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (5, 1, 128)])
def test_agrees_with_our_own_kernels(heads: int, kv_heads: int, dim: int) -> None:
    """Many plans in flight, so that a plan's buffers are used again while others wait."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer-python is not installed (pip install 'lectern[gpu]')")
    from serving.kernels import triton as kernels

    device, dtype = torch.device("cuda"), torch.bfloat16
    theirs = FlashInferPrefill(
        device, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, page_size=16, dtype=dtype
    )
    draws = np.random.default_rng(1)
    pairs = []
    for _ in range(9):
        lens = draws.integers(1, 900, 4).astype(np.int32)
        counts = np.array([int(draws.integers(1, n + 1)) for n in lens])
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        tables = draws.permutation(4 * 57).reshape(4, 57).astype(np.int32)
        kv = torch.randn(4 * 57, 2, 16, kv_heads, dim, device=device, dtype=dtype)
        q = torch.randn(int(starts[-1]), heads, dim, device=device, dtype=dtype)
        one, other = torch.zeros_like(q), torch.zeros_like(q)
        theirs.plan(starts, lens, tables).run(q, kv, one)
        shape = kernels.prefill_shape(heads, kv_heads, dim, dtype)
        tiles = kernels.prefill_tiles(starts, lens, 0, shape.tokens(heads, kv_heads))
        there = [torch.from_numpy(part).to(device) for part in (starts, lens, tables, tiles)]
        kernels.paged_prefill(
            q, kv, page_tables=there[2], table_rows=None, query_starts=there[0],
            context_lens=there[1], tiles=there[3], scale=dim**-0.5, sliding_window=None,
            shape=shape, out=other,
        )  # fmt: skip
        pairs.append((one, other))
    for one, other in pairs:
        assert float((one.float() - other.float()).abs().max()) < 0.02
