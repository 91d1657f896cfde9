"""The package of Triton kernels, interpreted or compiled, or a skip that says why not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.serving.interpreter import why_not_interpreted


def interpreted_kernels() -> ModuleType:
    """`serving.kernels.triton` in Triton's interpreter, on the CPU."""
    if why := why_not_interpreted():
        pytest.skip(why)
    import serving.kernels.triton

    return serving.kernels.triton


def compiled_kernels() -> ModuleType:
    """`serving.kernels.triton` for a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; run on a machine that has one")
    import serving.kernels.triton

    return serving.kernels.triton
