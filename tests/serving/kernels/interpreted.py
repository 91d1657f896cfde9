"""The Triton kernels in Triton's interpreter, for tests that run without a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch

_POSSIBLE = os.environ.get("TRITON_INTERPRET") == "1" or "triton" not in sys.modules
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Read when triton is imported first, which must not have happened before.
    os.environ["TRITON_INTERPRET"] = "1"


def interpreted_kernels() -> ModuleType:
    """`serving.kernels.triton`, or the test is skipped."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; its interpreter cannot run the kernels")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; the tests marked gpu run the compiled kernels on it")
    if not _POSSIBLE:
        pytest.skip("triton was imported before its interpreter could be switched on")
    import serving.kernels.triton

    return serving.kernels.triton


def compiled_kernels() -> ModuleType:
    """`serving.kernels.triton` for a GPU, or the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")
    import serving.kernels.triton

    return serving.kernels.triton
