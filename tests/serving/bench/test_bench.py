"""Loads, shapes, figures, and the command against a fake server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from serving import bench as bench_package
from serving.bench.loads import PEER_CONTEXT, context_needed, parse_load, warm_up
from serving.bench.machine import commit, hardware, memory_available
from serving.bench.runner import run_load, stage_shares
from serving.bench.shapes import shape_folder, shape_names
from serving.bench.targets import BenchError, Target, Times
from serving.cli import parse_size, register, resolve_model
from serving.config.model import ModelConfig
from serving.config.service import Service
from serving.demo_model import ensure_demo_model
from serving.errors import ConfigError
from serving.messages import StageSeconds
from serving.tokenizer import Tokenizer
from tests.serving.api.server import Server

FOLDER = Path(bench_package.__file__).parent

#: The workload and the shapes are the same bytes for every engine that is compared.
CHECKSUMS = {
    "workload.py": "ef27b02dd06b467f29e01ae6ae3533c62488203afb4b4a0b8e1b6a1576ce34d4",
    "models/qwen3-0.6b/config.json": (
        "f20d48bb1c78d0a33e7463dd46e6d737daeba4fbf4c47223a318b374f19dfbd7"
    ),
    "models/qwen3-8b/config.json": (
        "b96e3037d91d93dd555a8e2195a0e72e064c673b0413618cc25039c512724c47"
    ),
    "models/qwen3-14b/config.json": (
        "f83d41bb2ad9e38412437b9ea2c357fdae65e5beaec6fee9fc5c8b87f454cf93"
    ),
    "models/qwen3-32b/config.json": (
        "3c97fb7775cfb5f59297f21f688be6aba5f963ae34d8fe0a2ed942ab2c8e21ad"
    ),
}


def test_workload_and_shapes_are_unchanged() -> None:
    found = {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in CHECKSUMS}
    assert found == CHECKSUMS
    assert shape_names() == ["qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3-32b"]


def test_shares_of_a_stage_are_those_of_the_load_alone() -> None:
    before = [StageSeconds(), StageSeconds(busy=5.0, idle=100.0)]
    after = [StageSeconds(), StageSeconds(busy=14.0, wait_input=0.5, wait_link=0.25, idle=100.25)]
    # A stage without news keeps its place, so that the others keep theirs.
    assert stage_shares(before, after) == [
        {"busy": 0.0, "wait_input": 0.0, "wait_link": 0.0, "idle": 0.0},
        {"busy": 90.0, "wait_input": 5.0, "wait_link": 2.5, "idle": 2.5},
    ]
    assert stage_shares([], after) == []


def test_shapes_are_models() -> None:
    for name in shape_names():
        folder = shape_folder(name)
        assert folder is not None
        assert ModelConfig.from_folder(folder).family == "qwen3"
    assert shape_folder("qwen3-7b") is None
    assert shape_folder("../models/qwen3-8b") is None
    assert resolve_model("qwen3-8b") == (shape_folder("qwen3-8b"), "qwen3-8b")


def test_loads() -> None:
    load = parse_load("fixed-128-64:16:0")
    assert load.lengths == [(128, 64)] * 16
    assert load.arrivals == [0.0] * 16
    assert load.fixed
    chat = parse_load("chat:500:10")
    means = np.mean(chat.lengths, axis=0)
    assert 250 < means[0] < 350
    assert 200 < means[1] < 290
    assert chat.arrivals == sorted(chat.arrivals)
    assert 40 < chat.arrivals[-1] < 60
    assert chat.lengths == parse_load("chat:500:10").lengths
    assert len(chat.prompt(3, 5000)) == chat.lengths[3][0]
    assert chat.prompt(3, 5000) != chat.prompt(4, 5000)[: len(chat.prompt(3, 5000))]


@pytest.mark.parametrize(
    "text",
    ["chat", "chat:5", "chat:0:0", "chat:5:-1", "chat:5:x", "talk:5:0", "fixed-1:5:0",
     "fixed-0-5:5:0", "chat:5:0:1", "chat:5:nan", ""],
)  # fmt: skip
def test_bad_loads_are_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="--load") as caught:
        parse_load(text)
    assert "\n" not in str(caught.value)


def test_warm_up_and_context() -> None:
    fixed = [parse_load("fixed-128-64:16:0"), parse_load("fixed-8-300:1:0")]
    assert warm_up(fixed).text == "fixed-128-8:2:0"
    assert context_needed(fixed) == 308
    mixed = [*fixed, parse_load("long:4:0")]
    assert warm_up(mixed).text == "chat:64:0"
    assert context_needed(mixed) == PEER_CONTEXT


class Steady(Target):
    """A target that answers after a while, and remembers how many were at it."""

    def __init__(self, fails: bool = False) -> None:
        self.open = self.most = 0
        self.fails = fails

    async def ask(
        self, prompt: list[int], tokens_out: int, service: Service | None = None, salt: str = ""
    ) -> Times:
        self.open += 1
        self.most = max(self.most, self.open)
        now = asyncio.get_running_loop().time
        await asyncio.sleep(0.01)
        if self.fails:
            raise BenchError("A request gave 1 tokens instead of 2.")
        first = now()
        await asyncio.sleep(0.01)
        self.open -= 1
        return Times(first, now())

    async def close(self) -> None:
        pass


async def test_figures_of_a_load() -> None:
    target = Steady()
    figures = await run_load(target, parse_load("fixed-5-3:20:0"), 1000, lambda _: None)
    assert target.most == 20
    assert figures["n"] == 20
    assert figures["tot_tok_s"] == pytest.approx(figures["out_tok_s"] * 8 / 3, rel=0.01)
    assert figures["ttft_p50_ms"] >= 10
    spread = Steady()
    await run_load(spread, parse_load("fixed-5-3:20:100"), 1000, lambda _: None)
    assert spread.most < 20


async def test_a_missing_token_spoils_a_load() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await run_load(Steady(fails=True), parse_load("fixed-5-3:4:0"), 1000, lambda _: None)
    assert caught.group_contains(BenchError)


def test_the_machine_is_described() -> None:
    assert "cores" in hardware()
    assert memory_available() > 1 << 20
    found = commit()
    assert found is None or len(found.rstrip("+")) == 12


@pytest.mark.parametrize(
    ("text", "size"), [("1G", 1 << 30), ("512m", 512 << 20), ("1.5GiB", 3 << 29), ("100", 100)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--kv-memory") == size


def test_bad_sizes() -> None:
    for text in ("", "G", "-1G", "1X", "1 G B"):
        with pytest.raises(ConfigError, match="--kv-memory"):
            parse_size(text, "--kv-memory")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("home") / "demo-model")


@pytest.fixture
def served(demo: Path) -> Iterator[Server]:
    tokenizer = Tokenizer.from_folder(demo)
    with Server(tokenizer, 5760, reply=[70, 71], eos=0, max_model_len=4096).running() as server:
        yield server


def run(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_against_an_address(served: Server, demo: Path) -> None:
    code, out, err = run(
        "--model", str(demo), "--url", f"{served.url}/v1", "--json",
        "--load", "fixed-16-5:6:0", "--load", "fixed-4-2:2:0",
    )  # fmt: skip
    assert code == 0, err
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["load"], first["n"], first["engine"], first["tp"]) == (
        "fixed-16-5:6:0", 6, "lectern", 1,
    )  # fmt: skip
    assert second["n"] == 2
    for key in ("wall_s", "out_tok_s", "tot_tok_s", "ttft_p99_ms", "tpot_mean_ms", "e2e_mean_ms",
                "model", "pp", "commit", "date", "hardware", "matmul_s",
                "stages_percent"):  # fmt: skip
        assert key in first
    # The warm-up of two, then the loads.
    calls = [(len(call.prompt), call.params.max_tokens) for call in served.engine.calls]
    assert calls == [(16, 8)] * 2 + [(16, 5)] * 6 + [(4, 2)] * 2
    assert all(
        call.params.ignore_eos and call.params.temperature == 1.0 for call in served.engine.calls
    )


def test_bad_commands_are_one_sentence(demo: Path) -> None:
    for arguments, part in (
        (["--model", "/nowhere", "--load", "chat:1:0"], "does not exist"),
        (["--model", str(demo), "--load", "chat:1"], "--load"),
        (["--model", str(demo), "--load", "chat:1:0", "--seed", "-1"], "--seed must be at least 0"),
        (["--model", str(demo), "--load", "fixed-4-4:1:0", "--devices", "gpu"], "no device"),
        (
            ["--model", str(demo), "--load", "fixed-4-4:1:0", "--url", "http://127.0.0.1:9"],
            "--url",
        ),
        (["--model", str(demo), "--load", "fixed-4-4:1:0", "--page-size", "15"], "--page-size"),
        (["--model", str(demo), "--load", "fixed-4-4:1:0", "--kv-memory", "x"], "--kv-memory"),
        (["--model", str(demo), "--load", "chat:1:0", "--timeline", "x"], "ends in .svg"),
        (["--model", "x", "--load", "chat:1:0", "--timeline-window", "1"], "--timeline-window"),
        (
            ["--model", "x", "--load", "chat:1:0", "--timeline", "x.svg", "--url", "http://h"],
            "--timeline draws one run of an engine in this process; leave --url",
        ),
        (
            ["--model", "x", "--load", "a:1:0", "--load", "b:1:0", "--timeline", "x.svg"],
            "--timeline draws one run, and 2",
        ),
        (
            [
                "--model",
                str(demo),
                "--load",
                "fixed-4-4:1:0",
                "--no-matmul",
                "--tensor-parallel-size",
                "5",
            ],
            "--tensor-parallel-size",
        ),
    ):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert part in err
        assert err.startswith("lectern: ")
        assert len(err.splitlines()) == 1


def test_the_command_in_process(demo: Path) -> None:
    code, out, err = run(
        "--model", str(demo), "--json", "--load", "fixed-8-4:2:0", "--no-matmul", "--threads", "1",
        "--device", "cpu", "--tensor-parallel-size", "2",
    )  # fmt: skip
    assert code == 0, err
    row = json.loads(out)
    assert (row["n"], row["model"], row["pp"], row["tp"]) == (2, "demo-model", 1, 2)
    assert row["out_tok_s"] > 0


def test_a_timeline_of_two_stages(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    code, out, err = run(
        "--model", str(demo), "--json", "--load", "fixed-40-6:4:0", "--no-matmul",
        "--threads", "1", "--device", "cpu", "--pipeline-parallel-size", "2",
        "--timeline", str(path), "--timeline-window", "0:60",
    )  # fmt: skip
    assert code == 0, err
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    spans: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    held = [0, 0]
    box = r"stage (\d): (\d+) decodes, (\d+) prompt tokens, [\d.]+ ms \(([\d.]+) to ([\d.]+)\)"
    for stage, decodes, prompt, began, ended in re.findall(box, text):
        spans[int(stage)].append((float(began), float(ended)))
        held[0] += int(decodes)
        held[1] += int(prompt)
    # The warm-up is not in it; every stage had all tokens.
    assert held == [2 * 4 * 5, 2 * 4 * 40]
    assert len(spans[0]) == len(spans[1])
    wall = 1000 * json.loads(out)["wall_s"]
    for before, after in zip(spans[0], spans[1], strict=True):
        assert 0 <= before[0] < before[1] <= after[1] <= wall + 50
        assert after[0] >= before[0]
    for own in spans.values():
        assert all(one[1] <= two[0] + 0.02 for one, two in pairwise(own))
    assert text.count("5 layers") == 2
