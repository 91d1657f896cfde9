"""Norms, gate and rotary embedding: Triton on a GPU, native for bf16 on the CPU, or plain torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serving.kernels import reference
from serving.kernels.device import gpu_kernels
from serving.kernels.library import native

__all__ = ["add_rms_norm", "rms_norm", "rotary_and_write_kv", "silu_and_mul"]

# Below this many values a torch.nn call is not slower than starting a team of threads.
_ALONE = 1 << 15


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; the mean is in float32.

    x: [..., H]; weight: [H]; returns a new tensor like x.
    """
    if x.is_cuda and (gpu := gpu_kernels()) is not None and x.is_contiguous():
        normed: Tensor = gpu.rms_norm(x, weight, eps)
        return normed
    library = _library(x, weight)
    if library is None or not x.is_contiguous():
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.lectern_rms_norm(
        x.data_ptr(),
        None,
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        out.data_ptr(),
        None,
        _threads(x),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`total = x + residual`; returns `(rms_norm(total), total)`. All [T, H]."""
    if x.is_cuda and (gpu := gpu_kernels()) is not None:
        pair: tuple[Tensor, Tensor] = gpu.add_rms_norm(
            x.contiguous(), residual.contiguous(), weight, eps
        )
        return pair
    library = _library(x, residual, weight)
    if library is None or not (x.is_contiguous() and residual.is_contiguous()):
        return reference.add_rms_norm(x, residual, weight, eps)
    out, total = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    library.lectern_rms_norm(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        out.data_ptr(),
        total.data_ptr(),
        _threads(x),
    )
    return out, total


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(x[:, :I]) * x[:, I:]` of a fused gate-and-up product. x: [T, 2I] -> [T, I]."""
    if x.is_cuda and (gpu := gpu_kernels()) is not None and x.is_contiguous():
        gated: Tensor = gpu.silu_and_mul(x)
        return gated
    library = _library(x)
    if library is None or not x.is_contiguous():
        return reference.silu_and_mul(x)
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    library.lectern_silu_mul(
        x.data_ptr(), x.numel() // (2 * width), width, out.data_ptr(), _threads(x)
    )
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
    """Normalise (if asked) and rotate q and k, write k and v to their slots, return q.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; views of one fused product are fine. cos_sin: [P, D] float32,
    cosines in the first D/2 columns and sines in the rest. kv: [pages, 2, page_size, Hkv, D],
    written in place. slot_mapping: [T], `page * page_size + offset`; a negative slot writes
    nothing. q_norm, k_norm: [D] weights of a per-head RMS norm (Qwen3).
    """
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    dim = q.shape[2]
    side_by_side = all(t.stride(2) == 1 and t.stride(1) == dim for t in (q, k, v))
    if q.is_cuda and side_by_side and (gpu := gpu_kernels()) is not None:
        turned: Tensor = gpu.rotary_and_write_kv(
            q, k, v, cos_sin, positions, kv, slot_mapping, page_size,
            q_norm=q_norm, k_norm=k_norm, eps=eps,
        )  # fmt: skip
        return turned
    library = _library(q, k, v, kv, *norms)
    if (
        library is None
        or dim % 2
        or dim > 1024
        or not side_by_side
        or not kv.is_contiguous()
        or cos_sin.dtype is not torch.float32
        or not cos_sin.is_contiguous()
    ):
        return reference.rotary_and_write_kv(
            q, k, v, cos_sin, positions, kv, slot_mapping, page_size,
            q_norm=q_norm, k_norm=k_norm, eps=eps,
        )  # fmt: skip
    positions = positions.to(torch.int64).contiguous()
    slot_mapping = slot_mapping.to(torch.int64).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    library.lectern_rotary(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        eps,
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        dim,
        page_size,
        kv.data_ptr(),
        out.data_ptr(),
        _threads(q),
    )
    return out


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    for tensor in tensors:
        if tensor.dtype is not torch.bfloat16 or tensor.device.type != "cpu" or not tensor.numel():
            return None
    return native()


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < _ALONE else torch.get_num_threads()
