"""In which order waiting and half-prefilled sequences are served: one small file a policy."""

from __future__ import annotations

from serving.config.engine import EngineConfig
from serving.driver.order.base import Order
from serving.driver.order.fcfs import FirstComeFirstServed
from serving.driver.order.prefix import LongestPrefixFirst
from serving.driver.order.priority import Priority
from serving.driver.order.shortest import ShortestFirst
from serving.driver.order.slo import SloOrder
from serving.driver.outlook import Outlook


def make_order(config: EngineConfig, outlook: Outlook) -> Order:
    """The policy of `config.order`."""
    if config.order == "slo":
        return SloOrder(
            outlook,
            config.max_num_seqs,
            window=config.order_window,
            oldest_share=config.oldest_share,
            oldest_age=config.oldest_age,
            lead=config.fairness_tokens,
        )
    if config.order == "lpm":
        return LongestPrefixFirst(outlook)
    if config.order == "priority":
        return Priority()
    return ShortestFirst() if config.order == "sjf" else FirstComeFirstServed()


__all__ = ["Order", "make_order"]
