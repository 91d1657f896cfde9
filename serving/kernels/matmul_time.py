"""How long the matrix products of a load take by themselves: the floor under an engine's figure."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch

from serving.config.model import ModelConfig
from serving.kernels.linear import PackedLinear, pack_linear

__all__ = ["matrix_product_seconds", "products_of_load"]

# Enough weight that a pass over it finds none of it in a cache.
_COLD_BYTES = 256 << 20
_REPEATS = 3


def products_of_load(
    lengths: Sequence[tuple[int, int]], max_num_batched_tokens: int = 512
) -> tuple[Counter[int], Counter[int]]:
    """How often each number of rows passes the layers, and how often the head.

    lengths: tokens in and out of each request, all there at once. Prompts go in chunks, then all
    running requests take one step after the other; a request's first token comes with its prompt.
    """
    layers: Counter[int] = Counter()
    head: Counter[int] = Counter()
    prompts = sum(tokens for tokens, _ in lengths)
    layers[max_num_batched_tokens] = prompts // max_num_batched_tokens
    layers[prompts % max_num_batched_tokens] += 1
    head[len(lengths)] += 1
    for step in range(1, max((out for _, out in lengths), default=0)):
        running = sum(out > step for _, out in lengths)
        layers[running] += 1
        head[running] += 1
    return +Counter({m: n for m, n in layers.items() if m}), head


def matrix_product_seconds(
    config: ModelConfig,
    load_shape: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    max_num_batched_tokens: int = 512,
) -> float:
    """Seconds of this machine for the linear layers and the head of a load, and nothing else.

    load_shape: (tokens in, tokens out) of each request. Each number of rows is timed once (median
    of three passes over weights that are in no cache) and counted as often as the load needs it.
    Threads are torch's. Takes memory for some layers and the head of the model.
    """
    layers, head = products_of_load(load_shape, max_num_batched_tokens)
    h, dim = config.hidden_size, config.head_dim
    q, kv, wide = config.num_heads * dim, config.num_kv_heads * dim, config.intermediate_size
    shapes = [(q + 2 * kv, h), (h, q), (2 * wide, h), (h, wide)]
    layer_bytes = sum(n * k for n, k in shapes) * dtype.itemsize
    built = max(1, min(config.num_layers, -(-_COLD_BYTES // layer_bytes)))
    weights = [_random(n, k, dtype) for _ in range(built) for n, k in shapes]
    seconds = sum(
        count * _pass(weights, rows, dtype) * config.num_layers / built
        for rows, count in layers.items()
    )
    del weights
    vocabulary = [_random(config.vocab_size, h, dtype)]
    return seconds + sum(count * _pass(vocabulary, rows, dtype) for rows, count in head.items())


def _random(n: int, k: int, dtype: torch.dtype) -> PackedLinear:
    return pack_linear(torch.empty(n, k, dtype=dtype).uniform_(-0.05, 0.05))


@torch.inference_mode()
def _pass(weights: Sequence[PackedLinear], rows: int, dtype: torch.dtype) -> float:
    inputs = {w.in_features: torch.randn(rows, w.in_features).to(dtype) for w in weights}
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for weight in weights:
            weight(inputs[weight.in_features])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
