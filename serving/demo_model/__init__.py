"""The demo model: small, random, made on the spot, so that everything runs without a download."""

from serving.demo_model.make import ensure_demo_model

__all__ = ["ensure_demo_model"]
