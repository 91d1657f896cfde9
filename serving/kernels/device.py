"""Which kernels serve tensors that lie on a GPU."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

__all__ = ["gpu_kernels"]


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """`serving.kernels.triton`, or None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    import serving.kernels.triton

    return serving.kernels.triton
