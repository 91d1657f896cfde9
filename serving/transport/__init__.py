"""How tensors travel between stages: one contract, one file a way."""

from __future__ import annotations

from serving.transport.base import Transport

__all__ = ["Transport"]
