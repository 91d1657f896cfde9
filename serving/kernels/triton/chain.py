# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernels that start while the one before still ends (programmatic dependent launch, Hopper on).

Every kernel of a decode step waits for its predecessor before it touches what others write, so what
starts early is only launch work and the reading of weights. A kernel has ended when `follow`
returns in its successor, and with it all kernels before it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["early", "follow", "let_follow"]


@triton.jit
def let_follow(EARLY: tl.constexpr):
    """The next kernel may start; it waits in `follow` for what this one writes."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait until all kernels before this one have ended and their writes are seen."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@functools.cache
def early() -> dict[str, Any]:
    """Launch options of a kernel whose last constant is `bool(early())`."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability()[0] >= 9 else {}
