"""Lectern's serving engine. `from serving import LLM, SamplingParams` runs it from a script.

Names are loaded on first use, so that a stage or driver process imports only what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.config.engine import EngineConfig
    from serving.core import SamplingParams
    from serving.engine import Engine
    from serving.llm import LLM

__all__ = ["LLM", "Engine", "EngineConfig", "SamplingParams"]

_HOMES = {
    "LLM": "serving.llm",
    "Engine": "serving.engine",
    "EngineConfig": "serving.config.engine",
    "SamplingParams": "serving.core",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
