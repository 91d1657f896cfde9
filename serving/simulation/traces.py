"""Recorded loads as the simulator wants them: ids that begin alike where prompts did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.simulation.pipeline import Arrival, BlockChain
from serving.traces import Recorded, Trace
from serving.traces import read_trace as read
from serving.traces.agents import text_tokens
from serving.traces.recorded import BLOCK


def read_trace(path: Path, seed: int, *, most: int | None = None) -> tuple[list[Arrival], bool]:
    """The first `most` requests of a trace by arrival, and whether prompts share beginnings.

    `seed` draws the prompts of a trace that has none, and what its times leave open. Raises
    ConfigError.
    """
    trace = read(path, seed, most=most)
    return arrivals(trace, seed), trace.shares


def arrivals(trace: Trace, seed: int) -> list[Arrival]:
    """The same requests with prompts; equal blocks become equal ids, cheaper than random ones."""
    random = np.random.default_rng(seed)
    numbers: dict[tuple[int, int], int] = {}
    return [
        Arrival(one.at, _prompt(one, random), one.tokens_out, _chain(one, numbers))
        for one in trace.requests
    ]


def _chain(one: Recorded, numbers: dict[tuple[int, int], int]) -> BlockChain | None:
    """Blocks renamed to numbers that differ where anything before them did."""
    if one.prompt is not None or one.text or not one.blocks:
        return None
    chain, before = [], -1
    for block in one.blocks:
        before = numbers.setdefault((before, block), len(numbers))
        chain.append(before)
    return BlockChain(np.array(chain, dtype=np.int64), BLOCK)


def _prompt(one: Recorded, random: np.random.Generator) -> NDArray[np.int32]:
    if one.prompt is not None:
        return one.prompt
    if one.text:
        return text_tokens(one.text)
    if one.blocks:
        return np.repeat(np.array(one.blocks, dtype=np.int32) + 2, BLOCK)[: one.tokens_in]
    return random.integers(2, 1 << 31, one.tokens_in, dtype=np.int32)
