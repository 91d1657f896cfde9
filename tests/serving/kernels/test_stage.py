"""Whole layers as one native call against the single kernels in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving import kernels
from serving.kernels import reference

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, PAGE = 96, 176, 6, 2, 16
EPS = 1e-6


def bf16(*shape: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


class Layer:
    def __init__(self, g: torch.Generator, dim: int, *, bias: bool, normed: bool) -> None:
        width = (HEADS + 2 * KV_HEADS) * dim
        self.input_norm, self.post_norm = (1 + bf16(HIDDEN, generator=g) / 4 for _ in range(2))
        self.q_norm, self.k_norm = (1 + bf16(dim, generator=g) / 4 for _ in range(2))
        self.normed = normed
        self.qkv = bf16(width, HIDDEN, generator=g, scale=0.1)
        self.qkv_bias = bf16(width, generator=g) if bias else None
        self.output = bf16(HIDDEN, HEADS * dim, generator=g, scale=0.1)
        self.output_bias = bf16(HIDDEN, generator=g) if bias else None
        self.gate_up = bf16(2 * INTERMEDIATE, HIDDEN, generator=g, scale=0.1)
        self.down = bf16(HIDDEN, INTERMEDIATE, generator=g, scale=0.1)

    def weights(self, window: int | None) -> kernels.DecoderWeights:
        return kernels.DecoderWeights(
            input_norm=self.input_norm,
            qkv=kernels.pack_linear(self.qkv, self.qkv_bias),
            q_norm=self.q_norm if self.normed else None,
            k_norm=self.k_norm if self.normed else None,
            output=kernels.pack_linear(self.output, self.output_bias),
            post_norm=self.post_norm,
            gate_up=kernels.pack_linear(self.gate_up),
            down=kernels.pack_linear(self.down),
            sliding_window=window,
        )

    def plain(self, x: Tensor, kv: Tensor, table: Tensor, step: Step, window: int | None) -> Tensor:
        """The layer in float32, by the reference kernels."""

        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.float()

        linear, dim = torch.nn.functional.linear, kv.shape[4]
        fused = linear(
            reference.rms_norm(x, self.input_norm.float(), EPS),
            self.qkv.float(),
            wide(self.qkv_bias),
        )
        sizes = [HEADS * dim, KV_HEADS * dim, KV_HEADS * dim]
        q, k, v = (part.view(len(x), -1, dim) for part in fused.split(sizes, dim=-1))
        q = reference.rotary_and_write_kv(
            q,
            k,
            v,
            table,
            step.positions,
            kv,
            step.slots,
            PAGE,
            q_norm=wide(self.q_norm) if self.normed else None,
            k_norm=wide(self.k_norm) if self.normed else None,
            eps=EPS,
        )
        attended = reference.paged_attention(
            q,
            kv,
            query_starts=step.starts,
            context_lens=step.lengths,
            page_tables=step.tables,
            page_size=PAGE,
            scale=dim**-0.5,
            sliding_window=window,
        )
        x = x + linear(attended.reshape(len(x), -1), self.output.float(), wide(self.output_bias))
        normed = reference.rms_norm(x, self.post_norm.float(), EPS)
        gated = reference.silu_and_mul(linear(normed, self.gate_up.float()))
        return x + linear(gated, self.down.float())


class Step:
    """Sequences with `counts` new tokens after `lengths - counts` old ones."""

    def __init__(self, counts: list[int], lengths: list[int], tables: Tensor) -> None:
        self.lengths, self.tables = lengths, tables
        self.starts = [0]
        positions, slots = [], []
        for s, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            self.starts.append(self.starts[-1] + count)
            at = torch.arange(length - count, length)
            positions.append(at)
            slots.append(tables[s, at // PAGE].long() * PAGE + at % PAGE)
        self.positions, self.slots = torch.cat(positions), torch.cat(slots)


@pytest.mark.usefixtures("native", "poisoned")
@pytest.mark.parametrize(
    ("dim", "bias", "normed", "window"),
    [(128, False, True, None), (64, True, False, None), (96, False, False, 20)],
)
def test_stage(dim: int, bias: bool, normed: bool, window: int | None, threads: int) -> None:
    g = torch.Generator().manual_seed(dim)
    layers = [Layer(g, dim, bias=bias, normed=normed) for _ in range(3)]
    windows = [window, None, window]
    stage = kernels.native_stage(
        [layer.weights(w) for layer, w in zip(layers, windows, strict=True)],
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=dim,
        eps=EPS,
        scale=dim**-0.5,
    )
    assert stage is not None
    shape = (40, 2, PAGE, KV_HEADS, dim)
    kv = [torch.zeros(shape, dtype=torch.bfloat16) for _ in layers]
    wide = [torch.zeros(shape) for _ in layers]
    angle = torch.arange(64).float().unsqueeze(1) * 100.0 ** -(
        torch.arange(dim // 2).float() / (dim // 2)
    )
    table = torch.cat((angle.cos(), angle.sin()), dim=-1)
    tables = torch.randperm(40, generator=g)[:12].view(4, 3).to(torch.int32)
    # Two prompts; two go on while two more come; a step of decodes alone.
    for counts, rows in ([17, 30], [0, 1]), ([1, 1, 40, 2], [0, 1, 2, 3]), ([1, 1, 1], [0, 1, 3]):
        done = {0: 17, 1: 30} if len(counts) == 4 else {0: 18, 1: 31, 3: 2}
        if len(counts) == 2:
            done = {}
        lengths = [done.get(row, 0) + count for row, count in zip(rows, counts, strict=True)]
        step = Step(counts, lengths, tables[rows])
        hidden = bf16(step.starts[-1], HIDDEN, generator=g)
        before = hidden.clone()
        got = stage(
            hidden,
            kv,
            table,
            positions=step.positions,
            slot_mapping=step.slots,
            query_starts=torch.tensor(step.starts, dtype=torch.int32),
            context_lens=torch.tensor(step.lengths, dtype=torch.int32),
            page_tables=step.tables,
            page_size=PAGE,
        )
        assert torch.equal(hidden, before)
        last = torch.tensor([end - 1 for end in step.starts[1:]])
        for some in (last, last[:1], last[:0]):
            part = stage(
                hidden,
                kv,
                table,
                positions=step.positions,
                slot_mapping=step.slots,
                query_starts=torch.tensor(step.starts, dtype=torch.int32),
                context_lens=torch.tensor(step.lengths, dtype=torch.int32),
                page_tables=step.tables,
                page_size=PAGE,
                wanted=some,
            )
            assert part.shape == (len(some), HIDDEN)
            assert torch.allclose(part.float(), got[some].float(), rtol=0.02, atol=0.02)
        wanted = hidden.float()
        for layer, pages, w in zip(layers, wide, windows, strict=True):
            wanted = layer.plain(wanted, pages, table, step, w)
        error = (got.float() - wanted).norm() / wanted.norm()
        assert error < 0.01, error
        worst = (got.float() - wanted).abs().amax() / wanted.abs().amax()
        assert worst < 0.03, worst


@pytest.mark.usefixtures("plain")
def test_without_native_code_there_is_no_stage() -> None:
    layer = Layer(torch.Generator().manual_seed(0), 64, bias=False, normed=False).weights(None)
    assert (
        kernels.native_stage(
            [layer], num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=64, eps=EPS, scale=0.1
        )
        is None
    )


@pytest.mark.usefixtures("native")
def test_kv_of_another_dtype_is_refused() -> None:
    layer = Layer(torch.Generator().manual_seed(0), 64, bias=False, normed=False).weights(None)
    stage = kernels.native_stage(
        [layer], num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=64, eps=EPS, scale=0.1
    )
    assert stage is not None
    none = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="contiguous bfloat16 KV"):
        stage(
            torch.zeros(1, HIDDEN, dtype=torch.bfloat16),
            [torch.zeros(2, 2, PAGE, KV_HEADS, 64)],
            torch.zeros(4, 64),
            positions=none,
            slot_mapping=none,
            query_starts=torch.tensor([0, 1]),
            context_lens=torch.tensor([1]),
            page_tables=torch.zeros(1, 1, dtype=torch.int32),
            page_size=PAGE,
        )
