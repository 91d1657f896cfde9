from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main as lectern
from serving.config.engine import ORDERS
from serving.simulation.plots import load_for_waits, main, orders_of, read_rows

RECORDED = Path(__file__).parents[2] / "data" / "traces" / "mooncake_conversation_500.jsonl"
NAMES = ["scheduling-attainment.svg", "scheduling-waits.svg"]


def row(order: str, load: float, attainment: float, seed: int = 0) -> dict[str, Any]:
    classes = {
        name: {"n": 3, "wait_mean_s": wait, "ttft_p99_s": 3 * wait, "attainment": attainment}
        for name, wait in (("<1024", 0.0), ("1024-8191", 1.5), (">=8192", 60.0))
    }
    return {
        "trace": "conversation",
        "order": order,
        "load": load,
        "seed": seed,
        "attainment": attainment,
        "classes": classes,
    }


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def test_every_order_is_in_both_plots_and_two_runs_are_equal(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [row(o, 0.5, 0.9) for o in reversed(ORDERS)])
    second = written(tmp_path / "b.jsonl", [row(o, 0.95, 0.4) for o in ORDERS])
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two" / "deep"):
        assert main([str(first), str(second), "--out", str(folder)]) == 0
        assert sorted(path.name for path in folder.iterdir()) == NAMES
        drawn.append([(folder / name).read_bytes() for name in NAMES])
    assert drawn[0] == drawn[1]
    for svg in drawn[0]:
        assert len(svg) < 60_000
        assert b"<dc:date>" not in svg
        for order in ORDERS:
            assert f">{order}</text>".encode() in svg
    assert b"conversation, load 0.95" in drawn[0][1]


def test_seeds_are_averaged_and_a_row_given_twice_counts_once(tmp_path: Path) -> None:
    one_seed = [row("slo", 0.5, 0.6)]
    averaged = [row("slo", 0.5, 0.4, 1), row("slo", 0.5, 0.8, 2), row("slo", 0.5, 0.8, 2)]
    for name, rows in (("one", one_seed), ("averaged", averaged)):
        path = written(tmp_path / f"{name}.jsonl", rows)
        assert main([str(path), "--out", str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name / NAMES[0]).read_bytes() for name in ("one", "averaged"))
    assert one == two


def test_waits_are_drawn_at_a_load_that_every_order_has(tmp_path: Path) -> None:
    rows = [row("fcfs", load, 0.5) for load in (0.7, 0.9, 1.0, 1.2)]
    rows += [row("slo", load, 0.9) for load in (0.7, 0.9, 1.2, 1.5)]
    found = read_rows([written(tmp_path / "rows", rows)])
    assert orders_of(found) == ["fcfs", "slo"]
    assert load_for_waits(found, None) == 0.9
    assert load_for_waits(found, 1.2) == 1.2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "rows, line 2 is not a row"),
        ('{"order": "slo"}', "rows, line 2 is not a row"),
        (json.dumps(row("newest", 0.5, 0.5)), "rows, line 2 is not a row"),
        (json.dumps({**row("slo", 0.5, 0.5), "load": "as recorded"}), "Expected `float`"),
        (json.dumps({**row("slo", 0.5, 0.5), "attainment": None}), "$.attainment"),
        (json.dumps({**row("slo", 0.5, 0.5), "trace": "other"}), "line 2 is of the trace other"),
        (json.dumps(row("slo", 0.7, 0.5)), "no such load"),
    ],
)
def test_bad_rows_are_one_sentence_that_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    path = written(tmp_path / "rows", [row("fcfs", 0.5, 0.5)])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert said in err
    assert not out
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_rows_no_file_and_a_load_that_is_not_there_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = written(tmp_path / "empty", [])
    assert main([str(empty), "--out", str(tmp_path)]) == 1
    assert "no rows" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "nowhere cannot be read" in capsys.readouterr().err
    rows = written(tmp_path / "rows", [row("slo", 0.5, 0.5)])
    assert main([str(rows), "--out", str(tmp_path), "--at", "0.6"]) == 1
    assert "--at 0.6" in capsys.readouterr().err
    assert main([str(rows), "--out", str(rows)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_rows_of_the_simulator_are_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(RECORDED), "--requests", "20", "--load", "0.5"]
    with pytest.raises(SystemExit) as end:
        lectern(["simulate", *arguments, "--order", "fcfs", "--order", "slo", "--json"])
    assert not end.value.code
    path = tmp_path / "rows.jsonl"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in NAMES]
