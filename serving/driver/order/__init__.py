"""In which order waiting and half-prefilled sequences are served: one small file a policy."""

from __future__ import annotations

from serving.driver.order.base import Order
from serving.driver.order.fcfs import FirstComeFirstServed

_ORDERS: dict[str, type[Order]] = {"fcfs": FirstComeFirstServed}


def make_order(name: str) -> Order:
    """The policy of this name, one of the choices of `EngineConfig.order`."""
    return _ORDERS[name]()


__all__ = ["Order", "make_order"]
