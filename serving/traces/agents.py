"""Calls of agents with their text: JSON lines of timestamp, input, output and session_id.

A file is one session, or a tar archive of such files. The stamps are when a call was logged, which
is no arrival: sessions are given Poisson starts, and within one the next call comes after the log's
gap. The gap is what the call before took then plus the time to think, so that a replay does not
wait for slow answers and offers the same load to every order; long pauses are cut.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from serving.traces.recorded import Recorded

#: Mean seconds between the starts of two sessions, and the longest pause within one.
SESSION_GAP_S, LONGEST_PAUSE_S = 10.0, 10.0
#: Bytes of text that count as a token as long as no tokenizer has seen it.
TOKEN_BYTES = 4
#: An archive that unpacks to more than this is not a trace.
_MOST_BYTES = 1 << 30


class _Call(msgspec.Struct):
    timestamp: int | str  # microseconds
    input: str
    output: str
    session_id: str


def archived_lines(path: Path) -> Iterator[bytes]:
    """Lines of every .jsonl file of an archive, which is read without being unpacked.

    Raises ValueError for an archive beyond reason.
    """
    left = _MOST_BYTES
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith(".jsonl"):
                continue
            left -= member.size
            if left < 0:
                raise ValueError(f"it holds more than {_MOST_BYTES >> 30} GiB")
            file = archive.extractfile(member)
            if file is not None:
                yield from (line for line in file if line.strip())


def agent_calls(lines: Iterable[str | bytes], seed: int) -> tuple[list[Recorded], int]:
    """Calls with drawn times in any order, and how many were left out for having no text.

    Sessions start in an order drawn by the seed, whatever their order in the file.
    """
    decoder = msgspec.json.Decoder(_Call)
    sessions: dict[str, list[_Call]] = {}
    skipped = 0
    for line in lines:
        call = decoder.decode(line)
        if call.input:
            sessions.setdefault(call.session_id, []).append(call)
        else:
            skipped += 1
    random = np.random.default_rng([seed, 4])
    names = random.permutation(sorted(sessions)).tolist()
    starts = np.cumsum(random.exponential(SESSION_GAP_S, len(names)))
    found = []
    for name, start in zip(names, starts.tolist(), strict=True):
        calls = sorted(sessions[name], key=lambda call: int(call.timestamp))
        at, before = start, int(calls[0].timestamp)
        for call in calls:
            stamp = int(call.timestamp)
            at += min(LONGEST_PAUSE_S, (stamp - before) / 1e6)
            before = stamp
            found.append(
                Recorded(
                    at,
                    len(text_tokens(call.input)),
                    max(1, len(text_tokens(call.output))),
                    text=call.input,
                    answer=call.output,
                    session=name,
                )
            )
    return found, skipped


def text_tokens(text: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Ids that stand for a text where there is no tokenizer: one for each TOKEN_BYTES bytes.

    Texts that begin alike give ids that begin alike.
    """
    data = text.encode("utf-8", "surrogatepass")
    data += bytes(-len(data) % TOKEN_BYTES)
    # No id is negative, 0 or 1: the simulator ends answers with one of those.
    return (np.frombuffer(data, dtype="<i4") & 0x7FFFFFFF).clip(2).astype(np.int32)
