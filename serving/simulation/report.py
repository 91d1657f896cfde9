"""What a simulated run is summed up to: the bench's row, bubbles of each stage, preemptions; and
its timeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.bench.loads import workload
from serving.bench.timeline import Batch, Picture
from serving.core import Layout
from serving.simulation.pipeline import Arrival, Outcome, Step


def summarise(arrivals: list[Arrival], outcome: Outcome) -> dict[str, Any]:
    """The row of `workload.summary`, and what only the inside of an engine shows.

    `bubble_pct` of each stage: time with a plan but without its input, of that and busy time.
    """
    rows = [
        (first, (last - first) / max(1, one.tokens_out - 1), last, len(one.prompt), one.tokens_out)
        for one, first, last in zip(
            arrivals, outcome.first.tolist(), outcome.last.tolist(), strict=True
        )
    ]
    row: dict[str, Any] = workload.summary(rows, outcome.wall)
    row["bubble_pct"] = [
        round(100 * stage.wait_input / max(1e-9, stage.wait_input + stage.busy), 1)
        for stage in outcome.stages
    ]
    row["preemptions"] = outcome.preemptions
    row["microbatches"] = outcome.steps
    row["prefill_tokens"] = outcome.prefill_tokens
    row["decode_tokens"] = outcome.decode_tokens
    row["cached_tokens"] = outcome.cached_tokens
    return row


def draw_timeline(
    picture: Picture, steps: Sequence[Step], layouts: Sequence[Layout], title: str
) -> None:
    """Write a picture of all steps of a run, in which these layouts followed one another."""
    batches = [
        Batch(
            step.number,
            step.features.decode_rows,
            step.features.new_tokens,
            step.epoch,
            list(zip(step.began, step.ended, strict=True)),
        )
        for step in steps
    ]
    picture.write(batches, {layout.epoch: layout.counts for layout in layouts}, title)


#: Columns of the table for people: key of the row, heading, width.
_COLUMNS = (
    ("trace", "load", 26),
    ("load", "at", 11),
    ("order", "order", 8),
    ("policy", "policy", 9),
    ("budget", "tokens", 7),
    ("tot_tok_s", "tok/s", 9),
    ("tpot_mean_ms", "TPOT ms", 9),
    ("e2e_mean_ms", "e2e ms", 10),
    ("ttft_p50_ms", "TTFT p50", 10),
    ("ttft_p99_ms", "p99", 10),
    ("attainment", "attained", 8),
    ("max_wait_s", "max wait", 8),
    ("preemptions", "preempted", 10),
)


def heading() -> str:
    return "  ".join(f"{name:>{width}}" for _, name, width in _COLUMNS) + "  bubbles %"


def line(row: dict[str, Any]) -> str:
    """One row of the table under `heading`."""
    cells = "  ".join(f"{row[key]!s:>{width}}" for key, _, width in _COLUMNS)
    return f"{cells}  {' '.join(str(share) for share in row['bubble_pct'])}"
