"""Switches Triton's interpreter on where there is no GPU; import it before anything that imports
triton, such as transformers."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

__all__ = ["why_not_interpreted"]

_EARLY = os.environ.get("TRITON_INTERPRET") == "1" or "triton" not in sys.modules
_FOUND = importlib.util.find_spec("triton") is not None
if _FOUND and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def why_not_interpreted() -> str:
    """Why kernels cannot be run by the interpreter in this process; empty if they can."""
    if not _FOUND:
        return "triton is not installed; its interpreter cannot run the kernels"
    if torch.cuda.is_available():
        return "there is a GPU; the tests marked gpu run the compiled kernels on it"
    return "" if _EARLY else "triton was imported before its interpreter could be switched on"
