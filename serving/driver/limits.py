"""How many pages the cache gets and how long a sequence may be."""

from __future__ import annotations

from dataclasses import dataclass

from serving.config.engine import EngineConfig
from serving.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """`reason` says in words what decided."""

    num_pages: int
    max_model_len: int
    reason: str


def resolve_limits(config: EngineConfig, fitting_pages: int, context_length: int) -> Limits:
    """Pages and longest sequence of an engine whose stages can each hold `fitting_pages` pages.

    Raises ConfigError if a longest sequence that was asked for does not fit into the pages.
    """
    size = config.page_size
    wanted_len = config.max_model_len or context_length
    if config.num_kv_pages is not None:
        num_pages, reason = config.num_kv_pages, "as --num-kv-pages says"
    else:
        # Twice what all sequences can use at once leaves a full cache beside them.
        useful = 2 * config.max_num_seqs * -(-wanted_len // size)
        num_pages = min(fitting_pages, useful)
        reason = "as the KV memory allows" if fitting_pages < useful else "more would not be used"
    fitting_len = num_pages * size
    if fitting_len < 2:
        raise ConfigError(
            "The KV cache holds less than two tokens; raise --num-kv-pages or --kv-memory.",
            "--num-kv-pages",
        )
    if config.max_model_len is not None and config.max_model_len > fitting_len:
        flag = "--kv-memory" if config.num_kv_pages is None else "--num-kv-pages"
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but {num_pages} KV pages hold only "
            f"{fitting_len} tokens; lower --max-model-len or raise {flag}.",
            "--max-model-len",
        )
    if config.max_model_len is not None and config.max_model_len > context_length:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, but this model was made for at most "
            f"{context_length} tokens; lower --max-model-len.",
            "--max-model-len",
        )
    if fitting_len < wanted_len:
        reason += f"; the model could take {wanted_len} tokens with more pages"
    return Limits(num_pages, min(wanted_len, fitting_len), reason)
