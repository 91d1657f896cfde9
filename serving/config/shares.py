"""How a model is shared out among the ranks of a tensor-parallel stage.

Every rank has as many query heads as every other, the key-value heads these read, and as much of
the feed-forward width. With more ranks than key-value heads several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import replace

from serving.config.model import ModelConfig
from serving.errors import ConfigError

__all__ = ["possible_ranks", "rank_config"]

_FLAG = "--tensor-parallel-size"


def possible_ranks(model: ModelConfig) -> list[int]:
    """Every number of ranks that this model can be shared out to, in order."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    return [
        ranks
        for ranks in range(1, heads + 1)
        if heads % ranks == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and model.intermediate_size % ranks == 0
    ]


def rank_config(model: ModelConfig, ranks: int) -> ModelConfig:
    """The model as one rank sees it: its number of heads and its feed-forward width.

    The vocabulary stays whole, as every rank sees all logits. Raises ConfigError.
    """
    possible = possible_ranks(model)
    if ranks not in possible:
        raise ConfigError(
            f"{_FLAG} is {ranks}, but the model's {model.num_heads} query heads, "
            f"{model.num_kv_heads} key-value heads and feed-forward width of "
            f"{model.intermediate_size} can be shared out to {_listed(possible)} only; use one of "
            "these sizes, with --pipeline-parallel-size for more devices.",
            _FLAG,
        )
    return replace(
        model,
        num_heads=model.num_heads // ranks,
        num_kv_heads=max(1, model.num_kv_heads // ranks),
        intermediate_size=model.intermediate_size // ranks,
    )


def _listed(sizes: list[int]) -> str:
    words = [str(size) for size in sizes]
    ranks = "rank" if sizes == [1] else "ranks"
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) + f" {ranks}"
