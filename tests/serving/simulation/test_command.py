from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import main

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2249670,879,55
"""
MOONCAKE = "\n".join(
    json.dumps(row)
    for row in (
        {"timestamp": 0, "input_length": 1600, "output_length": 9, "hash_ids": [0, 1, 2, 3]},
        {"timestamp": 6000, "input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 4]},
        {"timestamp": 9000, "input_length": 9000, "output_length": 0, "hash_ids": list(range(18))},
    )
)


RECORDED = Path(__file__).parents[2] / "data" / "traces" / "mooncake_conversation_500.jsonl"


def number(row: dict[str, object], name: str) -> float:
    value = row[name]
    assert isinstance(value, int | float)
    return float(value)


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["simulate", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    code, out, err = simulate(capsys, *arguments, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_every_policy_and_budget_is_run_on_every_load(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(
        capsys,
        *("--load", "chat:20:10", "--load", "fixed-16-4:8:0", "--stages", "2"),
        *("--schedule-policy", "classic", "--schedule-policy", "throttle"),
        *("--max-num-batched-tokens", "256", "--max-num-batched-tokens", "512"),
    )
    assert len(found) == 8
    assert {(row["load"], row["policy"], row["budget"]) for row in found} == {
        (load, policy, budget)
        for load in ("chat:20:10", "fixed-16-4:8:0")
        for policy in ("classic", "throttle")
        for budget in (256, 512)
    }
    last = found[-1]
    assert last["n"] == 8
    assert last["prefill_tokens"] == 8 * 16
    assert last["decode_tokens"] == 8 * 3
    assert last["layout"] == [18, 18]


def test_the_table_has_a_heading_and_a_line_for_each_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = simulate(capsys, "--load", "fixed-16-4:8:0", "--layer-layout", "36")
    assert code == 0
    assert [len(line.split()) for line in out.splitlines()][1] == 14
    assert "bubbles" in out.splitlines()[0]


def test_traces_are_told_apart_scaled_and_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text(AZURE)
    mooncake.write_text(MOONCAKE)
    (whole,) = rows(capsys, "--trace", str(azure))
    assert whole["n"] == 3
    assert whole["prefill_tokens"] == 374 + 396 + 879
    (cut,) = rows(capsys, "--trace", str(mooncake), "--max-model-len", "4000", "--load", "0.5")
    assert (cut["n"], cut["dropped"]) == (2, 1)
    assert cut["cached_tokens"] == 1024
    assert (cut["trace"], cut["load"]) == ("m", 0.5)
    (slow,) = rows(capsys, "--trace", str(azure), "--requests", "2", "--load", "0.1")
    assert slow["n"] == 2


def test_orders_side_by_side_on_a_recorded_load(capsys: pytest.CaptureFixture[str]) -> None:
    """The order for targets meets more of them than any other, and the same twice."""
    arguments = ["--trace", str(RECORDED), "--requests", "100", "--load", "0.9", "--seed", "3"]
    orders = ("fcfs", "priority", "lpm", "sjf", "slo")
    found = rows(capsys, *arguments, *(part for order in orders for part in ("--order", order)))
    by_order = {str(row["order"]): row for row in found}
    assert len(by_order) == 5
    timing = "times_real_time"
    best = by_order.pop("slo")
    (again,) = rows(capsys, *arguments, "--order", "slo")
    assert again | {timing: 0} == best | {timing: 0}
    wanted = {"order", "load", "seed", "n", "dropped", "attainment", "attainment_ttft"}
    wanted |= {"attainment_tpot", "ttft_mean_s", "ttft_p99_s", "max_wait_s", "goodput_req_s"}
    assert wanted | {"jain"} <= best.keys()
    assert best["load"] == 0.9
    for other in by_order.values():
        assert number(best, "attainment") > number(other, "attainment")
    # All requests of this trace have the same priority, so the two orders are one.
    assert by_order["priority"] | {"order": "fcfs", timing: 0} == by_order["fcfs"] | {timing: 0}
    assert number(best, "max_wait_s") < 5 * number(by_order["fcfs"], "max_wait_s")


def test_long_prompts_are_mixed_in_and_targets_may_be_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    azure = tmp_path / "a.csv"
    azure.write_text(AZURE)
    (row,) = rows(
        capsys, "--trace", str(azure), "--mix", "0.4:5000", *("--slo-ttft", "none"),
        "--slo-tpot", "none",
    )  # fmt: skip
    assert number(row, "prefill_tokens") > 5000 + 374 + 396 - 1
    assert (row["attainment"], row["best_effort"]) == (None, 3)


def test_a_recorded_load_at_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        rows(capsys, "--trace", str(RECORDED), "--requests", "60", "--rate", rate)[0]
        for rate in ("0.5", "2")
    ]
    slow, fast = (number(row, "wall_s") for row in found)
    assert 60 / 0.5 < slow < 60 / 0.5 + 40
    assert 60 / 2 < fast < 60 / 2 + 40
    assert found[1]["load"] == "2 requests a second"


@pytest.mark.parametrize("stages", [2, 4])
def test_a_timeline_of_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stages: int
) -> None:
    path = tmp_path / "run.svg"
    (row,) = rows(
        capsys, "--load", "fixed-500-20:40:0", "--stages", str(stages), "--timeline", str(path),
        "--timeline-window", "0:100",
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert text.count("<g>") == stages * number(row, "microbatches")
    assert f"{row['microbatches']} of {row['microbatches']} micro-batches" in text
    assert text.count(f"{36 // stages} layers") == stages
    assert "qwen3-8b-h200, simulated: fixed-500-20:40:0, throttle" in text


def test_a_timeline_of_layers_that_move(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "moves.svg"
    load = ("--load", "fixed-100-60:250:60", "--stages", "4", "--layer-rebalance", "auto")
    (row,) = rows(capsys, *load, "--timeline", str(path))
    assert number(row, "moves") >= 1
    text = path.read_text(encoding="utf-8")
    assert ">9/9/9/9 → " in text
    assert text.count("<polyline") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--load KIND:N:RATE or --trace"),
        (("--load", "chat:5"), "--load"),
        (("--load", "chat:5:0", "--max-model-len", "5"), "--max-model-len"),
        (("--load", "chat:5:0", "--profile", "none"), "--profile"),
        (("--load", "chat:5:0", "--layer-layout", "a,b"), "--layer-layout"),
        (("--load", "chat:5:0", "--rate", "2"), "--rate"),
        (("--trace", str(RECORDED), "--rate", "-1"), "--rate"),
        (("--trace", str(RECORDED), "--load", "0.5", "--rate", "2"), "--rate"),
        (("--load", "chat:5:0", "--schedule-policy", "best"), "--schedule-policy"),
        (("--load", "chat:5:0", "--layer-rebalance", "always"), "--layer-rebalance"),
        (("--load", "chat:5:0", "--order", "best"), "--order"),
        (("--load", "chat:5:0", "--slo-ttft", "soon"), "--slo-ttft must be seconds above 0"),
        (("--load", "chat:5:0", "--slo-ttft", "0"), "--slo-ttft must be seconds above 0"),
        (("--load", "chat:5:0", "--slo-tpot", "-1"), "--slo-tpot must be seconds"),
        (("--trace", "{azure}", "--mix", "2:100"), "--mix must be a share"),
        (("--trace", "/nowhere"), "--trace"),
        (("--trace", "{empty}"), "--trace"),
        (("--trace", "{azure}", "--load", "fast"), "--load"),
        (("--trace", "{azure}", "--max-model-len", "5"), "--max-model-len"),
        (("--trace", "{azure}", "--requests", "1", "--load", "1"), "no duration"),
        (("--trace", "{azure}", "--requests", "-1"), "--requests must be at least 0"),
        (("--trace", "{heading}"), "--trace"),
        (("--trace", "{short}"), "--trace"),
        (("--trace", "{wide}"), "--trace"),
        (("--trace", "{few}"), "1 hash_ids cannot hold 600 tokens"),
        (("--load", "chat:5:0", "--profile", "{flat}"), "two points of every curve"),
        (("--load", "chat:5:0", "--num-kv-pages", "0"), "--num-kv-pages 0 of 16 tokens"),
        (("--load", "chat:5:0", "--seed", "-1"), "--seed must be at least 0"),
        (("--load", "chat:5:0", "--timeline", "a.png"), "--timeline writes SVG"),
        (("--load", "chat:5:0", "--timeline", "/nowhere/a.svg"), "folder of --timeline"),
        (("--load", "chat:5:0", "--timeline-window", "1"), "--timeline-window belongs to"),
        (
            ("--load", "chat:5:0", "--timeline", "{azure}.svg", "--timeline-window", "x"),
            "--timeline-window must be seconds",
        ),
        (
            ("--load", "chat:5:0", "--timeline", "{azure}.svg", "--timeline-window", "900:901"),
            "No micro-batch ran from 900 s",
        ),
        (
            (
                "--load",
                "chat:5:0",
                "--timeline",
                "{azure}.svg",
                "--order",
                "fcfs",
                "--order",
                "slo",
            ),
            "--timeline draws one run, and 2",
        ),
        (("--load", "chat:5:0", "--unknown-lengths", "--longest-answer", "0"), "--longest-answer"),
    ],
)
def test_bad_commands_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    heading, first, *_ = AZURE.splitlines()
    row = {"timestamp": 0, "input_length": 600, "output_length": 5}
    curves = {"layer_s": [], "decode_key_s": 0, "prefill_pair_s": 0, "head_s": [[1, 0.1]]}
    texts = {
        "azure": AZURE,
        "empty": "",
        "heading": heading,
        "short": f"{heading}\n{first.rpartition(',')[0]}\n",
        "wide": json.dumps(row | {"hash_ids": [99_999_999_999, 1]}),
        "few": json.dumps(row | {"hash_ids": [1]}),
        "flat": json.dumps({"name": "x", "source": "y", "layers": 2} | curves),
    }
    names = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        names[name].write_text(text)
    code, out, err = simulate(capsys, *(argument.format(**names) for argument in arguments))
    assert code == 2
    assert out == ""
    assert part in err
    assert err.startswith("lectern: ")
    assert err.count("\n") == 1
