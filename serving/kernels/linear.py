"""A weight matrix held once, in the layout its machine multiplies fastest."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from serving.kernels.device import gpu_kernels
from serving.kernels.library import MatrixFields, native
from serving.kernels.memory import large_zeros

__all__ = ["GpuLinear", "NativeLinear", "OnednnLinear", "PackedLinear", "pack_linear"]


class PackedLinear:
    """`y = x @ weight.T + bias` for a weight [N, K]; call it with x [M, K] to get [M, N].

    `rows(ids)` reads rows of the weight back, which lets a tied embedding share this one copy.
    This base class keeps the weight as it is and serves any device and dtype.
    """

    kind = "torch"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = bias
        self._weight = self._pack(weight)

    def _pack(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K] -> [M, N] in x's dtype."""
        return functional.linear(x, self._weight, self.bias)

    def float32(self, x: Tensor) -> Tensor:
        """x: [M, K] -> [M, N] in float32, as a sampler wants its logits; valid until the next call.

        The rows of a large vocabulary are some megabytes, which a fresh tensor would have to ask
        of the system, page by page, at every step.
        """
        return self(x).float()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight. ids: [T] integers -> [T, K]."""
        return functional.embedding(ids, self._weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight's values (a layout may add a little padding)."""
        return self.out_features * self.in_features * self.dtype.itemsize


class GpuLinear(PackedLinear):
    """Half precision on a GPU: products of few rows, which the memory bounds, by our own kernel."""

    kind = "gpu"

    def __call__(self, x: Tensor) -> Tensor:
        kernels = gpu_kernels()
        if kernels is None or x.dim() != 2 or not 0 < x.shape[0] <= kernels.MOST_ROWS:
            return super().__call__(x)
        product: Tensor = kernels.skinny_linear(x, self._weight, self.bias)
        return product


class NativeLinear(PackedLinear):
    """bf16 on the CPU, in the panels of native/gemm.h."""

    kind = "native"

    def _pack(self, weight: Tensor) -> Tensor:
        self._wide = torch.empty(0, dtype=torch.float32)
        library = _library()
        n, k = self.out_features, self.in_features
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        elements = library.lectern_packed_elements(n, k)
        packed = large_zeros([elements], torch.bfloat16)
        library.lectern_pack(
            weight.data_ptr(), n, k, weight.stride(0), packed.data_ptr(), torch.get_num_threads()
        )
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)
        return self._product(x, out)

    def float32(self, x: Tensor) -> Tensor:
        needed = x.numel() // self.in_features * self.out_features
        if self._wide.numel() < needed:
            self._wide = large_zeros([needed], torch.float32)
        out = self._wide[:needed].view(*x.shape[:-1], self.out_features)
        return self._product(x, out)

    def _product(self, x: Tensor, out: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if flat.dtype is not torch.bfloat16 or flat.device.type != "cpu":
            raise ValueError(f"this weight multiplies bfloat16 rows on the CPU, not {x.dtype}")
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        rows = flat.shape[0]
        if rows:
            workspace = torch.empty(rows * (self.in_features + 4), dtype=torch.bfloat16)
            _library().lectern_linear(
                flat.data_ptr(),
                rows,
                flat.stride(0),
                self._weight.data_ptr(),
                self.out_features,
                self.in_features,
                None if self.bias is None else self.bias.data_ptr(),
                out.data_ptr(),
                int(out.dtype is torch.float32),
                workspace.data_ptr(),
                torch.get_num_threads(),
            )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        wanted = ids.reshape(-1).to(torch.int64).contiguous()
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.out_features:
            raise IndexError(f"row numbers go from 0 to {self.out_features - 1}")
        out = torch.empty(wanted.numel(), self.in_features, dtype=torch.bfloat16)
        _library().lectern_rows(
            self._weight.data_ptr(),
            self.out_features,
            self.in_features,
            wanted.data_ptr(),
            wanted.numel(),
            out.data_ptr(),
        )
        return out.view(*ids.shape, self.in_features)

    def fields(self) -> MatrixFields:
        """The description that native code takes; valid while this object lives."""
        return MatrixFields(self._weight.data_ptr(), self.out_features, self.in_features)


class OnednnLinear(PackedLinear):
    """bf16 on a CPU without native kernels: oneDNN's blocked layout, for products of few rows.

    Rows cannot be read from that layout: the first `rows()` call turns the weight back to plain,
    for good.
    """

    kind = "onednn"

    def _pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        if not self._weight.is_mkldnn:
            return super().__call__(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return out

    def rows(self, ids: Tensor) -> Tensor:
        if self._weight.is_mkldnn:
            self._weight = self._weight.to_dense()
        return super().rows(ids)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Take over a weight [N, K] (and bias [N]); drop the original afterwards to hold it once."""
    if weight.dim() != 2:
        raise ValueError(f"a weight matrix has two dimensions, this one {tuple(weight.shape)}")
    same = bias is None or (bias.dtype is weight.dtype and bias.is_contiguous())
    if weight.is_cuda and weight.dtype.itemsize == 2 and same and gpu_kernels() is not None:
        return GpuLinear(weight, bias)
    if weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and same and weight.numel():
        if native() is not None:
            return NativeLinear(weight, bias)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return OnednnLinear(weight, bias)
    return PackedLinear(weight, bias)


def _library() -> ctypes.CDLL:
    library = native()
    if library is None:
        raise RuntimeError("this weight was packed for native kernels, which are off now")
    return library
