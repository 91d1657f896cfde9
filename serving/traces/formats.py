"""Reads recorded loads; the format is told by the file itself.

Azure's: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake's: JSON lines with timestamp
in ms, input_length, output_length and hash_ids, one id for each 512 tokens, chained by prefix.
Calls of agents: `serving/traces/agents.py`.
"""

from __future__ import annotations

import csv
import tarfile
import zlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from serving.errors import ConfigError
from serving.traces.agents import agent_calls, archived_lines
from serving.traces.recorded import BLOCK, Recorded, Trace

_STAMP_S = 3.0  # Mooncake's stamps are rounded to this
_IDS = 1 << 31


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, seed: int, *, most: int | None = None) -> Trace:
    """The first `most` requests of a trace by arrival.

    `seed` draws what a trace leaves open: the place of an arrival within a rounded stamp, and when
    the sessions of agents start. Raises ConfigError.
    """
    skipped = 0
    try:
        if tarfile.is_tarfile(path):
            found, skipped = agent_calls(archived_lines(path), seed)
            shares = True
        else:
            with path.open(encoding="utf-8") as file:
                lines = [line for line in (next(file, ""), *file) if line.strip()]
            if not lines:
                raise ValueError("it is empty")
            shares = lines[0].lstrip().startswith("{")
            if shares and "hash_ids" not in msgspec.json.decode(lines[0], type=dict):
                found, skipped = agent_calls(lines, seed)
            else:
                found = _mooncake(lines, seed) if shares else _azure(lines)
        if not found:
            raise ValueError("it holds no request")
    except (
        OSError, ValueError, LookupError, OverflowError, EOFError, tarfile.TarError,
        zlib.error, msgspec.DecodeError,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"--trace {path} is not a trace in Azure's or Mooncake's format or of agent calls "
            f"({error}).",
            "--trace",
        ) from error
    found.sort(key=lambda one: one.at)
    start = found[0].at
    requests = [replace(one, at=one.at - start) for one in found[:most]]
    return Trace(_name(path), requests, shares, skipped)


def _name(path: Path) -> str:
    stem, dot, _ = path.name.removesuffix(".gz").rpartition(".")
    return stem if dot else path.stem


def _azure(lines: list[str]) -> list[Recorded]:
    found = []
    # A field that a line lacks reads as empty, which is no number.
    for row in csv.DictReader(lines, restval=""):
        # Digits beyond microseconds are dropped.
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
        tokens_in, tokens_out = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        found.append(Recorded(stamp.timestamp(), max(1, tokens_in), max(1, tokens_out)))
    return found


def _mooncake(lines: list[str], seed: int) -> list[Recorded]:
    random = np.random.default_rng(seed)
    decoder = msgspec.json.Decoder(_Row)
    found = []
    for line in lines:
        row = decoder.decode(line)
        wanted = max(1, row.input_length)
        if wanted > len(row.hash_ids) * BLOCK:
            raise ValueError(f"{len(row.hash_ids)} hash_ids cannot hold {wanted} tokens")
        if not 0 <= min(row.hash_ids) <= max(row.hash_ids) < _IDS - 2:
            raise ValueError("hash_ids must be numbers from 0 to 2^31")
        blocks = tuple(row.hash_ids[: -(-wanted // BLOCK)])
        at = row.timestamp / 1000 + random.uniform(0, _STAMP_S)
        found.append(Recorded(at, wanted, max(1, row.output_length), blocks))
    return found
