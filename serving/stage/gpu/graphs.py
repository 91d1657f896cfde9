"""Recorded steps: CUDA graphs by padded size, so that a small step costs one launch, not hundreds.

Attention is inside. A pure decode of S sequences replays the graph of the next bucket of rows; a
micro-batch with prefill tokens replays the one of the next bucket of tokens, which holds the decode
kernel and room for prefill tiles. What the host changes between two replays lies in `Staging`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from serving.stage.gpu.staging import Size

__all__ = ["BUCKETS", "StepGraphs", "bucket_of"]

#: 1, 2, 4, then steps of 8 to 64, of 16 to 256, of 64 to 512.
BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 64))


def bucket_of(count: int) -> int | None:
    """The smallest bucket that holds `count`, or None if none does."""
    at = bisect_left(BUCKETS, count)
    return BUCKETS[at] if at < len(BUCKETS) else None


class StepGraphs:
    """Graphs by key, recorded into one memory pool on one stream.

    They share memory, so only the newest replay's results in the pool are valid: what must outlive
    a graph is copied to a buffer of its own inside it.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, Size | int], torch.cuda.CUDAGraph] = {}

    def record(self, kind: str, size: Size | int, work: Callable[[], None]) -> None:
        """Run `work` once, so that all it needs is compiled and loaded, then record it."""
        work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The stream is current already. torch.cuda.graph would collect garbage at every entry.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        self._graphs[kind, size] = graph

    def replay(self, kind: str, size: Size | int) -> bool:
        """Launch a recorded step; False if there is none of this kind and size."""
        graph = self._graphs.get((kind, size))
        if graph is None:
            return False
        graph.replay()
        return True

    def __contains__(self, key: tuple[str, Size | int]) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)
