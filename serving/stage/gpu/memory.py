"""A GPU's memory: how much the KV cache gets, and allocations that another process can map."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.errors import ConfigError, EngineDeadError

__all__ = ["GRAPH_RESERVE", "MemoryPlan", "device_tensor", "memory_plan"]

GIB = 1 << 30
#: Bytes kept for recorded steps: their activations, and the driver's copy of every launch.
GRAPH_RESERVE = 1 * GIB
_BLOCK = 2 << 20
#: About what a process takes of a GPU before it allocates anything, its kernels included.
_PROCESS = GIB * 3 // 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU: what may be used at all, and what is taken before the KV cache."""

    total: int
    utilization: float
    taken: int
    """In use once the weights are loaded, other processes' memory included; where stages share the
    GPU, this stage's own alone."""
    step: int
    """The most that one step needs on top, measured on a worst case."""
    sharing: int = 1
    """Stages that use this GPU; each gets as much of it as the others."""

    @property
    def kv(self) -> int:
        """Bytes for the KV cache. Raises ConfigError if none are left."""
        share = int(self.total * self.utilization) // self.sharing
        left = share - self.taken - self.step - GRAPH_RESERVE
        if left <= 0:
            raise ConfigError(
                f"The GPU has no memory left for the KV cache: of {self._share_words()}, taken "
                f"from --gpu-memory-utilization, weights and other processes take "
                f"{self.taken / GIB:.1f} GiB and a step {self.step / GIB:.1f} GiB; lower "
                "--max-num-batched-tokens or --max-num-seqs, or use more GPUs.",
                "--gpu-memory-utilization",
            )
        return left

    def sentence(self) -> str:
        """Why the KV cache has the size it has."""
        return (
            f"{self._share_words()}, less "
            f"{self.taken / GIB:.1f} in use after loading, {self.step / GIB:.1f} for a step and "
            f"{GRAPH_RESERVE / GIB:.1f} for recorded steps: {self.kv / GIB:.1f} GiB for KV"
        )

    def _share_words(self) -> str:
        words = f"{self.total / GIB:.1f} GiB of GPU memory x {self.utilization:g}"
        return words if self.sharing == 1 else f"{words} / {self.sharing} stages"


def memory_plan(
    total: int, utilization: float, *, taken: int, own: int, step: int, sharing: int
) -> MemoryPlan:
    """`taken` is in use on the GPU in all; `own` is what this stage holds for certain: weights and
    links. Of a shared GPU the other stages' part changes while they load, so only `own` counts."""
    if sharing > 1:
        taken = own + _PROCESS
    return MemoryPlan(total, utilization, taken, step, sharing)


class _Allocation:
    """Memory straight from the CUDA driver, in the form that torch can wrap without a copy."""

    def __init__(self, size: int) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_uint64()
        # Others may share a block with their neighbours, and an exported handle shows all of it.
        whole = -(-size // _BLOCK) * _BLOCK
        code = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(whole))
        if code != 0:
            raise EngineDeadError(
                f"The GPU gave no {size / GIB:.2f} GiB for KV pages (CUDA error {code}); lower "
                "--gpu-memory-utilization."
            )
        # Lives as long as the process: a stage allocates its pages once.
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address.value, False),
            "version": 3,
        }


def device_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in an allocation of their own, not the caching allocator's."""
    count = 1
    for size in shape:
        count *= size
    with torch.cuda.device(device):
        raw = torch.as_tensor(_Allocation(count * dtype.itemsize), device=device)
    return raw.view(dtype).view(shape).zero_()
