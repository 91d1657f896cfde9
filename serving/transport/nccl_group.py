"""Tensor-parallel ranks on GPUs of one host, over NCCL.

NCCL is called directly: a call costs the launching thread a few microseconds, it goes to the
stream that is current, and no thread of another library watches over it. NCCL reads its own
environment variables, such as NCCL_NVLS_ENABLE; none is set here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from serving.errors import ConfigError, EngineDeadError
from serving.transport.tensor_group import TensorGroup

__all__ = ["NcclTensorGroup"]

_ID_BYTES = 128
_SUM = 0
# ncclDataType_t of nccl.h
_DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
# Elements: NCCL connects and chooses by size, so small, middling and large ones are all used once.
_WARM_UP = (8, 1 << 16, 1 << 23)


class _Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _ID_BYTES)]


class NcclTensorGroup(TensorGroup):
    """One communicator, made at start and used by the launching thread alone."""

    def __init__(self, store: Any, stage: int, rank: int, size: int, device: torch.device) -> None:
        super().__init__(rank, size)
        self._stage, self._device = stage, device
        self._library = _load()
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # NCCL takes the context that is there
        name = _Id()
        if rank == 0:
            self._check(self._library.ncclGetUniqueId(ctypes.byref(name)))
            store.set("nccl", bytes(name).hex())
        else:
            ctypes.memmove(ctypes.byref(name), bytes.fromhex(store.get("nccl").decode()), _ID_BYTES)
        self._communicator = ctypes.c_void_p()
        self._check(
            self._library.ncclCommInitRank(ctypes.byref(self._communicator), size, name, rank)
        )

    def all_reduce(self, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError("only a contiguous tensor can be summed in place")
        address = tensor.data_ptr()
        self._check(
            self._library.ncclAllReduce(
                address,
                address,
                tensor.numel(),
                _DTYPES[tensor.dtype],
                _SUM,
                self._communicator,
                torch.cuda.current_stream(self._device).cuda_stream,
            )
        )

    def all_gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        rows, width = tensor.shape
        parts = tensor.new_empty(self.size, rows, width)
        self._check(
            self._library.ncclAllGather(
                tensor.data_ptr(),
                parts.data_ptr(),
                tensor.numel(),
                _DTYPES[tensor.dtype],
                self._communicator,
                torch.cuda.current_stream(self._device).cuda_stream,
            )
        )
        return parts.transpose(0, 1).reshape(rows, self.size * width)

    def warm_up(self) -> None:
        for count in _WARM_UP:
            ones = torch.ones(1, count, dtype=torch.bfloat16, device=self._device)
            self.all_reduce(ones)
            gathered = self.all_gather(ones)
            # The first step would otherwise be the first to see a link that does not work.
            if not bool((gathered == self.size).all()):
                raise EngineDeadError(
                    f"NCCL summed wrongly between the GPUs of stage {self._stage}; check the "
                    "links between them, or use --tensor-parallel-size 1."
                )

    def _check(self, code: int) -> None:
        if code != 0:
            said = self._library.ncclGetErrorString(code).decode()
            raise EngineDeadError(
                f"NCCL failed between the ranks of stage {self._stage} ({said}); set "
                "NCCL_DEBUG=WARN to see what it says."
            )


def _load() -> ctypes.CDLL:
    """The NCCL that torch itself has loaded, by its name."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise ConfigError(
            "Tensor parallelism on GPUs needs NCCL (libnccl.so.2), which comes with torch's CUDA "
            f"builds and was not found ({error}); use --tensor-parallel-size 1.",
            "--tensor-parallel-size",
        ) from error
    pointer, count, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, list[Any]] = {
        "ncclGetUniqueId": [ctypes.POINTER(_Id)],
        "ncclCommInitRank": [ctypes.POINTER(pointer), number, _Id, number],
        "ncclAllReduce": [pointer, pointer, count, number, number, pointer, pointer],
        "ncclAllGather": [pointer, pointer, count, number, pointer, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, number
    library.ncclGetErrorString.argtypes = [number]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library
