# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Norms, gate, and rotary embedding with the write of keys and values, one pass each.

Values are rounded to the tensors' dtype where `serving.kernels.reference` rounds them, except
inside the rotation, which is float32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm", "rotary_and_write_kv", "silu_and_mul"]

_HEADS = 8  # heads that one program turns


@triton.jit
def _norm_kernel(
    x, residual, weight, out, sums, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    value = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + at, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(sums.dtype.element_ty)
        tl.store(sums + row + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + at, (normed * gain).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_kernel(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, (opened * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turn(
    low_at, high_at, gain, angle_low, angle_high, held, columns, eps,
    DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm (if asked) and rotation of some heads, as two halves [heads, DIM / 2] in float32."""
    low = tl.load(low_at, mask=held, other=0.0)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = tl.load(high_at, mask=held, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        inside = columns < DIM // 2
        gain_low = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
        gain_high = tl.load(gain + DIM // 2 + columns, mask=inside, other=0.0).to(tl.float32)
        low = ((low * scale).to(dtype).to(tl.float32) * gain_low[None, :]).to(dtype)
        high = ((high * scale).to(dtype).to(tl.float32) * gain_high[None, :]).to(dtype)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    cos = angle_low.to(dtype).to(tl.float32)[None, :]
    sin = angle_high.to(dtype).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rotary_kernel(
    q, k, v, q_gain, k_gain, angles, positions, slots, kv, out, eps,
    q_token, k_token, v_token, angle_row, kv_page, kv_value, kv_slot, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr, AT_ONCE: tl.constexpr, Q_BLOCKS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    """One token; the first Q_BLOCKS programs turn query heads, the others write keys and values."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    half: tl.constexpr = DIM // 2
    c = tl.arange(0, HALF_PAD)
    angle_at = angles + tl.load(positions + token).to(tl.int64) * angle_row + c
    cos = tl.load(angle_at, mask=c < half, other=0.0)
    sin = tl.load(angle_at + half, mask=c < half, other=0.0)
    if block < Q_BLOCKS:
        head = block * AT_ONCE + tl.arange(0, AT_ONCE)
        held = (head[:, None] < HEADS) & (c[None, :] < half)
        at = q + token * q_token + head[:, None] * DIM + c[None, :]
        low, high = _turn(at, at + half, q_gain, cos, sin, held, c, eps, DIM, Q_NORM)
        to = out + (token * HEADS + head[:, None]) * DIM + c[None, :]
        tl.store(to, low.to(out.dtype.element_ty), mask=held)
        tl.store(to + half, high.to(out.dtype.element_ty), mask=held)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            head = (block - Q_BLOCKS) * AT_ONCE + tl.arange(0, AT_ONCE)
            held = (head[:, None] < KV_HEADS) & (c[None, :] < half)
            at = k + token * k_token + head[:, None] * DIM + c[None, :]
            low, high = _turn(at, at + half, k_gain, cos, sin, held, c, eps, DIM, K_NORM)
            to = kv + (slot // PAGE) * kv_page + (slot % PAGE) * kv_slot
            to = to + head[:, None] * kv_head + c[None, :]
            tl.store(to, low.to(kv.dtype.element_ty), mask=held)
            tl.store(to + half, high.to(kv.dtype.element_ty), mask=held)
            at = v + token * v_token + head[:, None] * DIM + c[None, :]
            low_value = tl.load(at, mask=held, other=0.0)
            high_value = tl.load(at + half, mask=held, other=0.0)
            tl.store(to + kv_value, low_value.to(kv.dtype.element_ty), mask=held)
            tl.store(to + kv_value + half, high_value.to(kv.dtype.element_ty), mask=held)


# The kernels carry no types of their own.
_norm: Any = _norm_kernel
_silu: Any = _silu_kernel
_rotary: Any = _rotary_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`. x: [..., H], contiguous; weight: [H]."""
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`total = x + residual`; returns `(rms_norm(total), total)`. All [T, H], contiguous."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, out, total, eps, add=True)
    return out, total


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, *,
    add: bool,
) -> None:  # fmt: skip
    width = x.shape[-1]
    rows = x.numel() // width
    if rows:
        block = triton.next_power_of_2(width)
        warps = 4 if block <= 2048 else 8
        _norm[(rows,)](x, residual, weight, out, total, eps, width, block, add, num_warps=warps)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(x[:, :I]) * x[:, I:]`. x: [T, 2I], contiguous -> [T, I]."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    rows = x.numel() // (2 * width)
    if rows:
        block = min(2048, triton.next_power_of_2(width))
        _silu[(rows, triton.cdiv(width, block))](x, out, width, block, num_warps=4)
    return out


def rotary_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv: Tensor,
    slot_mapping: Tensor,
    page_size: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `serving.kernels.reference.rotary_and_write_kv`; heads of q, k and v lie side by side."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    q_blocks = triton.cdiv(heads, _HEADS)
    _rotary[(tokens, q_blocks + triton.cdiv(kv_heads, _HEADS))](
        q, k, v, cos_sin if q_norm is None else q_norm, cos_sin if k_norm is None else k_norm,
        cos_sin, positions, slot_mapping, kv, out, eps,
        q.stride(0), k.stride(0), v.stride(0), cos_sin.stride(0), *kv.stride()[:4],
        heads, kv_heads, dim, triton.next_power_of_2(dim // 2), page_size, _HEADS, q_blocks,
        q_norm is not None, k_norm is not None, num_warps=2,
    )  # fmt: skip
    return out
