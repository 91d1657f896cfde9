"""`lectern bench --trace`: in virtual time, against an address, and with a real engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from serving.bench.settings import Settings, TraceSettings
from serving.bench.targets import InProcess
from serving.bench.trace_run import WARM_UP, run_trace
from serving.cli import register
from serving.config.engine import EngineConfig
from serving.errors import ConfigError
from tests.serving.bench.address import Address
from tests.serving.bench.virtual_time import OneByOne, run_virtually
from tests.serving.tiny import make_checkpoint, make_tokenizer

FOLDER = Path(__file__).parents[2] / "data" / "traces"
AZURE = str(FOLDER / "azure_conv_500.csv")
MOONCAKE = str(FOLDER / "mooncake_conversation_500.jsonl")
AGENTS = str(FOLDER / "lmcache_magagent_3_sessions.tar.gz")

Rows = list[dict[str, Any]]


def wanted(**given: Any) -> TraceSettings:
    default: dict[str, Any] = {
        "trace": AZURE, "mix": "", "requests": 0, "rate": 0.0, "time_scale": 0.0, "orders": [],
        "slo_ttft": "max(2,5*own)", "slo_tpot": "0.1", "goodput": False, "seconds": 90.0,
        "rates": 5,
    }  # fmt: skip
    return TraceSettings(**(default | given))


@pytest.fixture
def virtually(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Rows, list[tuple[EngineConfig, OneByOne]], str]]:
    """Run a trace against engines that prefill one by one; rows, engines, and what was said."""
    engines: list[tuple[EngineConfig, OneByOne]] = []

    async def start(config: EngineConfig, progress: Any) -> OneByOne:
        engines.append((config, OneByOne(token_s=1e-4, context=config.max_model_len)))
        return engines[-1][1]

    monkeypatch.setattr(InProcess, "start", start)

    def run(
        model: str = "qwen3-0.6b", max_model_len: int | None = None, seed: int = 0, **given: Any
    ) -> tuple[Rows, list[tuple[EngineConfig, OneByOne]], str]:
        engine = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "page_size": 16,
                  "dtype": "auto", "device": "cpu", "max_num_seqs": 64,
                  "max_model_len": max_model_len}  # fmt: skip
        settings = Settings(model, [], "", "", True, False, seed, "64M", engine)
        run_virtually(run_trace(settings, wanted(**given)))
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], engines, err

    return run


def test_a_row_for_every_order(virtually: Any) -> None:
    rows, engines, said = virtually(orders=["fcfs", "sjf"], requests=40, rate=2.0)
    assert [(row["order"], row["n"], row["rate"], row["seed"]) for row in rows] == [
        ("fcfs", 40, 2.0, 0), ("sjf", 40, 2.0, 0),
    ]  # fmt: skip
    for key in ("engine", "model", "trace", "mix", "attainment", "attainment_ttft", "best_effort",
                "attainment_tpot", "ttft_mean_s", "ttft_p99_s", "max_wait_s", "refused", "jain",
                "ttft_p99_longest_5pct_s", "goodput_req_s", "classes", "dropped", "hardware",
                "commit", "slo_ttft", "slo_tpot", "wall_s"):  # fmt: skip
        assert key in rows[0]
    assert rows[0]["dropped"] == 0
    assert (rows[0]["trace"], rows[0]["model"]) == ("azure_conv_500", "qwen3-0.6b")
    assert [config.order for config, _ in engines] == ["fcfs", "sjf"]
    assert not any(config.enable_prefix_caching for config, _ in engines)
    assert all(engine.closed for _, engine in engines)
    # Both are judged by the lone prefills of the first.
    first, second = ([one for one in engine.asked if one[4]] for _, engine in engines)
    assert len(first) > len(second) == 40 + WARM_UP[0]
    assert [one[1:4] for one in first[-40:]] == [one[1:4] for one in second[-40:]]
    assert {one[4] for one in first}.isdisjoint(one[4] for one in second)
    assert "lone prefills by tokens: 16: 0.002 s, 256: 0.026 s" in said


def test_targets_follow_the_own_prefill(virtually: Any) -> None:
    _, ((_, engine),), _ = virtually(requests=5, slo_ttft="max(0.001,2*own)", slo_tpot="none")
    for _, prompt, _, service, _ in engine.asked[-5:]:
        assert service.tpot is None
        assert service.ttft.seconds == pytest.approx(2e-4 * len(prompt))


def test_equal_runs_are_equal_and_seeds_draw(virtually: Any) -> None:
    def run(seed: int) -> tuple[Any, Any]:
        rows, engines, _ = virtually(trace=MOONCAKE, requests=30, mix="0.1:8192", seed=seed)
        asked = [(at, prompt) for at, prompt, *_ in engines[-1][1].asked[-30:]]
        return asked, {key: rows[0][key] for key in ("attainment", "max_wait_s", "jain")}

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]


def test_prefixes_are_kept_for_a_trace_that_shares_them(virtually: Any) -> None:
    rows, ((config, engine),), said = virtually(
        trace=MOONCAKE, requests=30, mix="0.1:8192", max_model_len=9000
    )
    assert config.enable_prefix_caching
    (row,) = rows
    assert row["n"] + row["dropped"] == 30
    assert row["dropped"] > 0
    assert f"{row['dropped']} requests are longer than 9000 tokens" in said
    asked = engine.asked[-row["n"] :]
    assert sum(len(one[1]) == 8192 for one in asked) == 3
    assert row["classes"][">=8192"]["n"] >= 3
    assert row["mix"] == "0.1:8192"
    begins = {tuple(one[1][:512]) for one in asked if len(one[1]) != 8192}
    assert len(begins) == 1  # one block is in all of its requests


def test_times_may_be_stretched(virtually: Any) -> None:
    _, ((_, engine),), _ = virtually(requests=8, time_scale=3.0)
    _, (_, (_, plain)), _ = virtually(requests=8)
    gaps = [
        [one[0] - asked[0][0] for one in asked] for asked in (engine.asked[-8:], plain.asked[-8:])
    ]
    assert gaps[0] == pytest.approx([3 * gap for gap in gaps[1]])


def test_agent_calls_carry_text_and_program(virtually: Any, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", num_hidden_layers=1, max_position_embeddings=16384)
    make_tokenizer(tmp_path)
    rows, ((_, engine),), said = virtually(model=str(tmp_path), trace=AGENTS, rate=1.0)
    (row,) = rows
    assert row["n"] + row["dropped"] == 34
    assert "have no text" in said
    calls = engine.asked[-row["n"] :]
    assert len({one[3].program for one in calls}) == 3
    assert all(max(one[1]) < 320 for one in calls)
    # A call that repeats the one before has little of its own.
    assert min(one[3].ttft.seconds for one in calls) == 2.0


def test_text_needs_a_tokenizer(virtually: Any) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        virtually(trace=AGENTS)


def test_goodput_is_bracketed(virtually: Any) -> None:
    rows, _, _ = virtually(
        orders=["fcfs"], goodput=True, seconds=30.0, rates=6, slo_ttft="0.5", slo_tpot="none"
    )
    *tried, last = rows
    assert len(tried) == 6
    good = [row["rate"] for row in tried if (row["attainment"] or 0) >= 0.9
            and all(part["attainment"] >= 0.8 for part in row["classes"].values())]  # fmt: skip
    assert last["goodput_rate_req_s"] == pytest.approx(max(good))
    bad = [row["rate"] for row in tried if row["rate"] not in good]
    assert last["next_bad_rate_req_s"] == pytest.approx(min(bad))
    assert max(good) < min(bad)
    # A prefill takes about 0.1 s, so more than ten a second is too much.
    assert 3.0 < last["goodput_rate_req_s"] < 10.0
    for row in tried:
        assert row["n"] == pytest.approx(30 * row["rate"], abs=1)
    assert last["order"] == "fcfs"


def test_goodput_without_an_end_says_so(virtually: Any) -> None:
    rows, _, said = virtually(goodput=True, seconds=10.0, rates=2, rate=0.3, slo_ttft="100")
    assert rows[-1]["next_bad_rate_req_s"] is None
    assert rows[-1]["goodput_rate_req_s"] == pytest.approx(0.45)
    assert "give a higher --rate" in said
    rows, _, said = virtually(goodput=True, seconds=10.0, rates=2, slo_ttft="0.000001")
    assert rows[-1]["goodput_rate_req_s"] == 0.0
    assert "give a lower --rate" in said
    rows, _, said = virtually(goodput=True, requests=20, seconds=10.0, rates=1, rate=50.0)
    assert rows[0]["n"] == 20
    assert "20 requests last only 0 s at 50 a second" in said


def bench(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, "qwen3", num_hidden_layers=1, max_position_embeddings=2048)
    return str(folder)


def against(address: Address, model: str) -> tuple[int, str, str]:
    with address.running() as url:
        return bench(
            "--model", model, "--trace", AZURE, "--requests", "12", "--rate", "100", "--json",
            "--url", f"{url}/v1",
        )  # fmt: skip


def second(body: dict[str, Any]) -> bool:
    """The second row of the trace, by the length of its answer."""
    return bool(body["max_tokens"] == 109)


def test_against_an_address(tiny: str) -> None:
    address = Address(refused=second, context=900)
    code, out, err = against(address, tiny)
    assert code == 0, err
    row = json.loads(out)
    assert (row["n"] + row["dropped"], row["refused"]) == (12, 1)
    assert row["dropped"] > 0  # by the context that the server tells
    assert row["attainment"] == pytest.approx(1 - 1 / row["n"], abs=1e-6)
    assert row["order"] is None
    assert row["url"]
    asked = address.asked[-row["n"] :]
    for headers, body in asked:
        assert float(headers["X-Lectern-TTFT-Ms"]) >= 2000
        assert headers["X-Lectern-TPOT-Ms"] == "100.000"
        assert body["ignore_eos"]
        assert body["cache_salt"]
    before, _ = address.asked[0]
    assert before["X-Lectern-TTFT-Ms"] == before["X-Lectern-TPOT-Ms"] == "none"


def test_an_address_that_fails_ends_the_run(tiny: str) -> None:
    for address, part in (
        (Address(failed=second), "The server failed: out of order"),
        (Address(cut=second), "A request gave 108 tokens instead of 109"),
        (Address(refused=lambda body: body["max_tokens"] == 1), "The server answered 429"),
    ):
        code, out, err = against(address, tiny)
        assert code == 1
        assert out == ""
        assert f"lectern: {part}" in err


def test_bad_commands_are_one_sentence(tiny: str, tmp_path: Path) -> None:
    rows = Path(AZURE).read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join(rows[:2]))
    base = ["--model", tiny]
    trace = [*base, "--trace", AZURE]
    for arguments, part in (
        (base, "Give --load KIND:N:RATE or --trace FILE"),
        ([*trace, "--load", "chat:1:0"], "not both"),
        ([*base, "--load", "chat:1:0", "--mix", "0.1:9"], "--mix belongs to --trace"),
        ([*base, "--load", "chat:1:0", "--order", "slo"], "--order belongs to --trace"),
        ([*base, "--load", "chat:1:0", "--requests", "5"], "--requests belongs to --trace"),
        ([*base, "--goodput"], "Give --load"),
        ([*trace, "--rate", "1", "--time-scale", "2"], "--time-scale"),
        ([*trace, "--goodput", "--time-scale", "2"], "--goodput"),
        ([*trace, "--order", "fcfs", "--url", "http://127.0.0.1:9"], "--order"),
        ([*trace, "--order", "best"], "--order"),
        ([*trace, "--order", "fcfs", "--order", "best"], "--order"),
        ([*trace, "--goodput", "--timeline", "x.svg"], "--timeline draws one run"),
        ([*trace, "--timeline", "x.svg", "--order", "slo", "--order", "sjf"], "and 2 are asked"),
        ([*trace, "--move-every", "1", "--pipeline-parallel-size", "2"], "--move-every moves"),
        ([*trace, "--rate", "-1"], "--rate must be at least 0"),
        ([*trace, "--rate", "nan"], "--rate must be at least 0"),
        ([*trace, "--requests", "-1"], "--requests must be at least 0"),
        ([*trace, "--time-scale", "-2"], "--time-scale must be at least 0"),
        ([*trace, "--goodput", "--seconds", "0"], "--seconds must be at least 1"),
        ([*trace, "--goodput", "--rates", "0"], "--rates must be at least 1"),
        ([*trace, "--slo-ttft", "soon"], "--slo-ttft"),
        ([*trace, "--slo-tpot", "-1"], "--slo-tpot"),
        ([*trace, "--mix", "0.1"], "--mix must be"),
        ([*trace, "--max-model-len", "20"], "--max-model-len"),
        ([*base, "--trace", "/nowhere"], "--trace"),
        ([*base, "--trace", AGENTS], "no tokenizer"),
        ([*base, "--trace", str(tmp_path / "one.csv"), "--rate", "1"], "no duration"),
        ([*trace, "--url", "http://127.0.0.1:9"], "--url"),
        (["--model", "/nowhere", "--trace", AZURE], "does not exist"),
    ):
        code, out, err = bench(*arguments)
        assert code == 2, (arguments, err)
        assert out == ""
        assert part in err
        assert err.startswith("lectern: ")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("order", ["fcfs", "slo"])
def test_with_a_real_engine(tiny: str, tmp_path: Path, order: str) -> None:
    path = tmp_path / "run.svg"
    code, out, err = bench(
        "--model", tiny, "--trace", AZURE, "--requests", "10", "--rate", "20", "--json",
        "--device", "cpu", "--threads", "1", "--kv-memory", "64M", "--max-num-batched-tokens",
        "512", "--slo-ttft", "100", "--slo-tpot", "10", "--order", order,
        "--timeline", str(path), "--timeline-window", "0:600",
    )  # fmt: skip
    assert code == 0, err
    drawn = path.read_text(encoding="utf-8")
    assert f", measured: {json.loads(out)['trace']} {order} 20/s<" in drawn
    recorded = Path(AZURE).read_text().splitlines()[1:11]
    prompts = sum(int(held) for held in re.findall(r"(\d+) prompt tokens, ", drawn))
    assert prompts == sum(int(line.split(",")[1]) for line in recorded)
    row = json.loads(out)
    assert (row["n"], row["refused"], row["order"]) == (10, 0, order)
    assert (row["attainment"], row["attainment_ttft"], row["attainment_tpot"]) == (1.0, 1.0, 1.0)
    assert 0 < row["ttft_mean_s"] <= row["ttft_p99_s"] < row["wall_s"]
    assert sum(part["n"] for part in row["classes"].values()) == 10
