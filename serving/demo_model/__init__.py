"""The demo model: small, random, made on the spot, so that everything runs without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.demo_model.make import ensure_demo_model

__all__ = ["ensure_demo_model"]


def __getattr__(name: str) -> Any:
    # On first use: training needs torch and tokenizers alone, not what the engine needs.
    if name != "ensure_demo_model":
        raise AttributeError(f"module 'serving.demo_model' has no attribute {name!r}")
    from serving.demo_model.make import ensure_demo_model

    return ensure_demo_model
