"""The calls of the CUDA driver that order work between processes on streams, through ctypes.

Signatures are those of the CUDA driver API; a name with `_v2` is the one that the header maps the
plain name to. Streams, events and device addresses are plain integers here. The calling thread's
current context must be the device's primary one, which torch makes current.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from serving.errors import EngineDeadError

__all__ = ["CudaDriver", "LinkRefusedError", "StreamDriver"]

_WAIT_GEQ = 0  # waits until (int32)(*address - value) >= 0, so numbers may wrap
_NON_BLOCKING = 1
_NO_TIMING = 2
_LAZY_PEER_ACCESS = 1
#: CUDA_ERROR_INVALID_VALUE, _PEER_ACCESS_UNSUPPORTED, _NOT_PERMITTED, _NOT_SUPPORTED
_REFUSALS = (1, 217, 800, 801)
# Smaller allocations may share one block with others, which an exported handle would all show.
_BLOCK = 2 << 20


class LinkRefusedError(Exception):
    """This machine does not allow a link of this kind; the message says what was refused."""


class StreamDriver(Protocol):
    """What a peer link needs of a device. Nothing but `finished_within` waits on the host."""

    def allocate(self, size: int) -> int:
        """Address of `size` zeroed bytes in an allocation of their own."""

    def export(self, address: int) -> bytes:
        """A handle by which another process can open this allocation."""

    def open(self, handle: bytes) -> int:
        """Where another process's allocation lies here; it stays mapped. LinkRefusedError."""

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of memory of this process's own device."""

    def stream(self) -> int: ...

    def event(self) -> int: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait_event(self, stream: int, event: int) -> None:
        """Nothing to wait for if the event was never recorded."""

    def copy(self, stream: int, target: int, source: int, size: int) -> None: ...

    def write(self, stream: int, address: int, value: int) -> None:
        """Write 32 bits, after everything before it on the stream is visible everywhere."""

    def wait(self, stream: int, address: int, value: int) -> None:
        """Until the 32 bits at an address of this device have reached `value`, cyclically."""

    def finished_within(self, streams: Sequence[int], seconds: float) -> bool:
        """Whether all that was launched on these streams was finished in time."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class _Region:
    """An address in the form that torch wraps without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDriver:
    """The StreamDriver of one GPU. Raises LinkRefusedError where the driver is too old."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.set_device(device)
        # Makes the primary context the current one of this thread.
        torch.zeros(1, device=device)
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise LinkRefusedError(f"libcuda.so.1 cannot be loaded ({error})") from error
        self._declare()
        context = ctypes.c_void_p()
        self._do("cuCtxGetCurrent", ctypes.byref(context))
        self._context = context
        self._writes_values = True

    def _declare(self) -> None:
        """Argument types, without which ctypes would cut addresses to 32 bits."""
        pointer, address = ctypes.c_void_p, ctypes.c_uint64
        word, size = ctypes.c_uint32, ctypes.c_size_t
        calls: dict[str, list[Any]] = {
            "cuCtxGetCurrent": [pointer],
            "cuCtxSetCurrent": [pointer],
            "cuGetErrorName": [ctypes.c_int, pointer],
            "cuMemAlloc_v2": [pointer, size],
            "cuMemGetAddressRange_v2": [pointer, pointer, address],
            "cuMemsetD8_v2": [address, ctypes.c_ubyte, size],
            "cuMemsetD32Async": [address, ctypes.c_uint, size, pointer],
            "cuMemcpyAsync": [address, address, size, pointer],
            "cuIpcGetMemHandle": [pointer, address],
            "cuIpcOpenMemHandle_v2": [pointer, _IpcHandle, ctypes.c_uint],
            "cuStreamCreate": [pointer, ctypes.c_uint],
            "cuStreamSynchronize": [pointer],
            "cuStreamWaitEvent": [pointer, pointer, ctypes.c_uint],
            "cuStreamWaitValue32_v2": [pointer, address, word, ctypes.c_uint],
            "cuStreamWriteValue32_v2": [pointer, address, word, ctypes.c_uint],
            "cuEventCreate": [pointer, ctypes.c_uint],
            "cuEventRecord": [pointer, pointer],
        }
        for name, arguments in calls.items():
            try:
                call = getattr(self._library, name)
            except AttributeError:
                raise LinkRefusedError(f"the GPU driver is too old: it has no {name}") from None
            call.argtypes, call.restype = arguments, ctypes.c_int

    # ---- memory

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        rounded = -(-size // _BLOCK) * _BLOCK
        self._do("cuMemAlloc_v2", ctypes.byref(address), rounded)
        self._do("cuMemsetD8_v2", address.value, 0, rounded)
        # The fill may still run when the call returns, and other streams do not wait for it.
        torch.cuda.synchronize(self._device)
        return address.value

    def export(self, address: int) -> bytes:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._do("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        if base.value != address:
            raise LinkRefusedError("memory to be shared lies inside another allocation")
        handle = _IpcHandle()
        self._ask("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        self._ask(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            _LAZY_PEER_ACCESS,
        )
        return address.value

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize
        for length in shape:
            size *= length
        raw = torch.as_tensor(_Region(address, size), device=self._device)
        return raw.view(dtype).view(shape)

    # ---- streams

    def stream(self) -> int:
        stream = ctypes.c_void_p()
        self._do("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def event(self) -> int:
        event = ctypes.c_void_p()
        self._do("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        self._do("cuEventRecord", event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._do("cuStreamWaitEvent", stream, event, 0)

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        self._do("cuMemcpyAsync", target, source, size, stream)

    def write(self, stream: int, address: int, value: int) -> None:
        if self._writes_values:
            code = self._library.cuStreamWriteValue32_v2(stream, address, value, 0)
            if code == 0:
                return
            if code not in _REFUSALS:
                raise self._failure("cuStreamWriteValue32", code)
            # Mapped memory of another device is no target for it here; a fill of one word is
            # ordered by the stream as well.
            self._writes_values = False
        self._do("cuMemsetD32Async", address, value, 1, stream)

    def wait(self, stream: int, address: int, value: int) -> None:
        self._ask("cuStreamWaitValue32_v2", stream, address, value, _WAIT_GEQ)

    def finished_within(self, streams: Sequence[int], seconds: float) -> bool:
        """A stream may wait for ever, so another thread waits for it, left behind if need be."""
        done = threading.Event()
        failures: list[EngineDeadError] = []

        def wait() -> None:
            try:
                self._do("cuCtxSetCurrent", self._context)
                for stream in streams:
                    self._do("cuStreamSynchronize", stream)
            except EngineDeadError as error:
                failures.append(error)
            done.set()

        threading.Thread(target=wait, daemon=True, name="streams").start()
        finished = done.wait(seconds)
        for failure in failures:
            raise failure
        return finished

    # ---- results of calls

    def _do(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise self._failure(name, code)

    def _ask(self, name: str, *arguments: Any) -> None:
        """A call that this machine may refuse."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise LinkRefusedError(f"{name} answered {self._error_name(code)}")

    def _failure(self, name: str, code: int) -> EngineDeadError:
        return EngineDeadError(f"The CUDA call {name} failed with {self._error_name(code)}.")

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(code, ctypes.byref(text)) != 0 or text.value is None:
            return f"error {code}"
        return text.value.decode()
