"""Recorded loads: who came when, with how many tokens, and which prompts begin alike.

Two formats, told apart by the first line: Azure's (CSV with TIMESTAMP, ContextTokens,
GeneratedTokens) and Mooncake's (JSON lines with timestamp in ms, input_length, output_length and
hash_ids, one id for each 512 tokens, chained by prefix).
"""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from serving.errors import ConfigError
from serving.simulation.pipeline import Arrival

_BLOCK = 512
_STAMP_S = 3.0  # Mooncake's stamps are rounded to this


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, seed: int, *, most: int | None = None) -> tuple[list[Arrival], bool]:
    """The first `most` requests of a trace by arrival, and whether prompts share beginnings.

    `seed` draws the prompts of a trace that has none, and the place of an arrival within a rounded
    stamp. Raises ConfigError.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in (next(file, ""), *file) if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        shared = lines[0].lstrip().startswith("{")
        found = _mooncake(lines, seed) if shared else _azure(lines, seed)
        if not found:
            raise ValueError("it has a heading alone")
    except (OSError, ValueError, LookupError, OverflowError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"--trace {path} is not a trace in Azure's or Mooncake's format ({error}).", "--trace"
        ) from error
    found.sort(key=lambda arrival: arrival.at)
    start = found[0].at
    return [
        Arrival(one.at - start, one.prompt, max(1, one.tokens_out)) for one in found[:most]
    ], shared


def _azure(lines: list[str], seed: int) -> list[Arrival]:
    random = np.random.default_rng(seed)
    found = []
    # A field that a line lacks reads as empty, which is no number.
    for row in csv.DictReader(lines, restval=""):
        # Digits beyond microseconds are dropped.
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
        prompt = random.integers(2, 1 << 31, max(1, int(row["ContextTokens"])), dtype=np.int32)
        found.append(Arrival(stamp.timestamp(), prompt, int(row["GeneratedTokens"])))
    return found


def _mooncake(lines: list[str], seed: int) -> list[Arrival]:
    """Equal block ids become equal tokens, so that the prefix cache finds what was shared."""
    random = np.random.default_rng(seed)
    decoder = msgspec.json.Decoder(_Row)
    found = []
    for line in lines:
        row = decoder.decode(line)
        blocks = np.array(row.hash_ids, dtype=np.int32) + 2
        wanted = max(1, row.input_length)
        if wanted > len(blocks) * _BLOCK:
            raise ValueError(f"{len(blocks)} hash_ids cannot hold {wanted} tokens")
        prompt = np.repeat(blocks, _BLOCK)[:wanted]
        at = row.timestamp / 1000 + random.uniform(0, _STAMP_S)
        found.append(Arrival(at, prompt, row.output_length))
    return found
