"""Readers of recorded loads, on the committed parts of public traces and on bad files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from serving.errors import ConfigError
from serving.simulation.traces import arrivals
from serving.simulation.traces import read_trace as read_arrivals
from serving.traces import Trace, read_trace
from serving.traces.agents import LONGEST_PAUSE_S, text_tokens

FOLDER = Path(__file__).parents[2] / "data" / "traces"
AZURE = FOLDER / "azure_conv_500.csv"
MOONCAKE = FOLDER / "mooncake_conversation_500.jsonl"
AGENTS = FOLDER / "lmcache_magagent_3_sessions.tar.gz"


def test_azure() -> None:
    trace = read_trace(AZURE, 0)
    assert (trace.name, len(trace.requests), trace.shares) == ("azure_conv_500", 500, False)
    first, second = trace.requests[:2]
    assert (first.at, first.tokens_in, first.tokens_out) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579)
    assert (second.tokens_in, second.tokens_out) == (396, 109)
    assert read_trace(AZURE, 5).requests == trace.requests  # nothing is left open


def test_mooncake() -> None:
    trace = read_trace(MOONCAKE, 0)
    assert (len(trace.requests), trace.shares) == (500, True)
    at = [one.at for one in trace.requests]
    assert at[0] == 0.0
    assert at == sorted(at)
    lengths = sorted((one.tokens_in, one.tokens_out) for one in trace.requests)
    rows = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]
    assert lengths == sorted((row["input_length"], row["output_length"]) for row in rows)
    for one in trace.requests:
        assert len(one.blocks) == -(-one.tokens_in // 512)
    assert read_trace(MOONCAKE, 0).requests == trace.requests
    other = read_trace(MOONCAKE, 1)
    assert [one.at for one in other.requests] != at
    assert sorted(one.blocks for one in other.requests) == sorted(
        one.blocks for one in trace.requests
    )


def test_agents() -> None:
    trace = read_trace(AGENTS, 0)
    assert trace.shares
    assert len(trace.requests) + trace.skipped == 34
    assert trace.skipped > 0  # calls without text
    sessions: dict[str, list[float]] = {}
    for one in trace.requests:
        assert one.text
        assert one.tokens_in == -(-len(one.text.encode()) // 4)
        sessions.setdefault(one.session, []).append(one.at)
    assert len(sessions) == 3
    for times in sessions.values():
        gaps = np.diff(times)
        assert (gaps >= 0).all()
        assert gaps.max() <= LONGEST_PAUSE_S + 1e-6
    assert trace.requests[0].at == 0.0
    again = {one.session: one.at for one in reversed(read_trace(AGENTS, 1).requests)}
    assert again != {name: times[0] for name, times in sessions.items()}


def test_a_session_alone_is_a_trace(tmp_path: Path) -> None:
    with tarfile.open(AGENTS) as archive:
        member = archive.getmembers()[0]
        file = archive.extractfile(member)
        assert file is not None
        lone = tmp_path / Path(member.name).name
        lone.write_bytes(file.read())
    trace = read_trace(lone, 0)
    assert {one.session for one in trace.requests} == {lone.name.partition(".")[0]}


def test_the_first_requests_are_those_that_come_first() -> None:
    for path in (AZURE, MOONCAKE, AGENTS):
        assert read_trace(path, 2, most=7).requests == read_trace(path, 2).requests[:7]


def test_texts_that_begin_alike_give_ids_that_begin_alike() -> None:
    left, right = text_tokens("the same words, then this"), text_tokens("the same words, but that")
    assert (left[:4] == right[:4]).all()
    assert left[4] != right[4]
    assert min(text_tokens("\x00\x00\x00\x00\x01").tolist()) == 2


def test_the_simulator_meets_the_same_requests() -> None:
    for path in (AZURE, MOONCAKE, AGENTS):
        trace = read_trace(path, 3)
        found, shared = read_arrivals(path, 3)
        assert shared == trace.shares
        for one, arrival in zip(trace.requests, found, strict=True):
            assert (arrival.at, len(arrival.prompt), arrival.tokens_out) == (
                one.at, one.tokens_in, one.tokens_out,
            )  # fmt: skip
            assert arrival.prompt.dtype == np.int32
            assert arrival.prompt.min() >= 2
    left, right = (arrivals(read_trace(AZURE, 0, most=2), seed) for seed in (0, 1))
    assert (left[0].prompt != right[0].prompt).any()
    tokenised = read_trace(AGENTS, 0, most=2).tokenised(lambda text: list(text.encode()))
    (first, _) = arrivals(tokenised, 0)
    assert bytes(first.prompt.tolist()).decode() == tokenised.requests[0].text


CALL = {"timestamp": "5", "input": "a", "output": "b", "session_id": "s"}
ROW = {"timestamp": 0, "input_length": 600, "output_length": 5}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "it holds no request"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.6,5\n", "GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,5\n", "noon"),
        (json.dumps(ROW | {"hash_ids": [1]}), "1 hash_ids cannot hold 600 tokens"),
        (json.dumps(ROW | {"hash_ids": [-1, 2]}), "from 0 to 2^31"),
        (json.dumps(ROW | {"hash_ids": [1, 99_999_999_999]}), "from 0 to 2^31"),
        (json.dumps(ROW | {"hash_ids": "x"}), "hash_ids"),
        ("{nonsense", "malformed"),
        (json.dumps({"question": 1}), "missing required field"),
        (json.dumps(CALL | {"input": ""}), "it holds no request"),
        (json.dumps(CALL | {"timestamp": "noon"}), "noon"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--trace") as caught:
        read_trace(path, 0)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def archive(path: Path, name: str, data: bytes) -> Path:
    with tarfile.open(path, "w:gz") as made:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        made.addfile(member, io.BytesIO(data))
    return path


def test_bad_archives_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = json.dumps(CALL).encode()
    good = archive(tmp_path / "good.tar.gz", "x/s.jsonl", call)
    assert len(read_trace(good, 0).requests) == 1
    assert read_trace(good, 0).name == "good"
    other = archive(tmp_path / "other.tar.gz", "x/s.txt", call)
    cut = tmp_path / "cut.tar.gz"
    whole = AGENTS.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(whole[:9000] + bytes(200) + whole[9200:])
    folder = tmp_path
    for path in (other, cut, torn, folder, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="--trace"):
            read_trace(path, 0)
    monkeypatch.setattr("serving.traces.agents._MOST_BYTES", len(call) - 1)
    with pytest.raises(ConfigError, match="more than"):
        read_trace(good, 0)


def test_names() -> None:
    names = {path: read_trace(path, 0, most=1).name for path in (AZURE, MOONCAKE, AGENTS)}
    assert names == {
        AZURE: "azure_conv_500",
        MOONCAKE: "mooncake_conversation_500",
        AGENTS: "lmcache_magagent_3_sessions",
    }
    assert isinstance(read_trace(AZURE, 0), Trace)
