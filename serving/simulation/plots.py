"""Plots of simulated orders of service: attainment over load, and waits by length of prompt.

    python -m serving.simulation.plots ROWS.jsonl [...] --out FOLDER [--at LOAD]

reads what `lectern simulate --trace FILE --load NUMBER --json` printed and writes two SVG files.
Rows of several seeds are averaged. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from serving.bench.attainment import LENGTH_CLASSES
from serving.errors import ConfigError, LecternError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTAINMENT, WAITS = "scheduling-attainment.svg", "scheduling-waits.svg"


class ClassFigures(msgspec.Struct, frozen=True):
    """Of one length class, in seconds."""

    wait_mean_s: float
    ttft_p99_s: float


class Row(msgspec.Struct, frozen=True):
    """What is drawn of a row that `lectern simulate` printed."""

    trace: str
    order: Literal["fcfs", "priority", "lpm", "sjf", "slo"]
    load: float
    seed: int
    attainment: float
    classes: dict[str, ClassFigures]


#: Colour (of different lightness), line, marker and hatch, so that grey prints can be read.
_LOOKS = {
    "fcfs": ("#9a9a9a", "--", "s", ""),
    "priority": ("#c9a227", (0, (1, 1)), "v", "xx"),
    "lpm": ("#6fa8dc", ":", "^", "//"),
    "sjf": ("#d9822b", "-.", "D", "\\\\"),
    "slo": ("#12355b", "-", "o", ""),
}
_CLASS_LABELS = {
    "<1024": "under\n1,024",
    "1024-8191": "1,024 to\n8,191",
    ">=8192": "8,192\nand more",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay text
    "svg.hashsalt": "lectern",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
#: Seconds at which bars begin.
_LOWEST = 0.01


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of all files, of one trace. Raises ConfigError that names file and line."""
    rows: dict[tuple[str, float, int], Row] = {}
    trace = ""
    for path in paths:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.", "ROWS") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = msgspec.json.decode(line, type=Row)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{path}, line {number} is not a row of `lectern simulate --trace FILE --load "
                    f"NUMBER --json`: {error}.",
                    "ROWS",
                ) from error
            if trace and row.trace != trace:
                raise ConfigError(
                    f"{path}, line {number} is of the trace {row.trace} and earlier rows are of "
                    f"{trace}; plot one trace at a time.",
                    "ROWS",
                )
            trace = row.trace
            rows[row.order, row.load, row.seed] = row
    if not rows:
        raise ConfigError("There are no rows to plot in the files given.", "ROWS")
    return list(rows.values())


def orders_of(rows: list[Row]) -> list[str]:
    """The orders that rows are of, always in the same succession."""
    found = {row.order for row in rows}
    return [order for order in _LOOKS if order in found]


def load_for_waits(rows: list[Row], wanted: float | None) -> float:
    """The load asked for, else the highest up to 1 that every order has. Raises ConfigError."""
    of_order = [{row.load for row in rows if row.order == order} for order in orders_of(rows)]
    common = set.intersection(*of_order)
    if wanted is None and common:
        return max((load for load in common if load <= 1), default=min(common))
    if wanted in common and wanted is not None:
        return wanted
    there = ", ".join(f"{load:g}" for load in sorted(common)) or "none"
    asked = "" if wanted is None else f" of --at {wanted:g}"
    raise ConfigError(
        f"Waits are drawn at one load that every order has rows of; there is no such load{asked}, "
        f"the rows have {there}.",
        "--at",
    )


def draw_attainment(rows: list[Row]) -> Figure:
    """Attainment over load, one line an order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for order in orders_of(rows):
        loads = sorted({row.load for row in rows if row.order == order})
        shares = [
            100 * fmean(row.attainment for row in rows if (row.order, row.load) == (order, load))
            for load in loads
        ]
        colour, line, marker, _ = _LOOKS[order]
        width = 3.2 if order == "fcfs" else 1.8  # seen even beneath a line of the same figures
        axes.plot(loads, shares, color=colour, ls=line, marker=marker, lw=width, label=order)
    axes.set_xlabel("load (1 = the rate that fcfs can just work off)")
    axes.set_ylabel("requests that met both targets (%)")
    axes.set_xticks(sorted({row.load for row in rows}))
    axes.set_ylim(0, 102)
    axes.grid(axis="y", lw=0.4, color="#cccccc")
    axes.legend(title="order", frameon=False, handlelength=4)
    axes.set_title(rows[0].trace, fontsize=10)
    return figure


def draw_waits(rows: list[Row], load: float) -> Figure:
    """Mean wait and p99 of the time to the first token by length class, bars an order."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.load == load]
    classes = [name for name, _, _ in LENGTH_CLASSES if all(name in one.classes for one in rows)]
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    means = {
        order: [[one.classes[name] for one in rows if one.order == order] for name in classes]
        for order in orders_of(rows)
    }
    _bars(left, {o: [fmean(one.wait_mean_s for one in at) for at in m] for o, m in means.items()})
    _bars(right, {o: [fmean(one.ttft_p99_s for one in at) for at in m] for o, m in means.items()})
    for axes, title in ((left, "mean wait"), (right, "p99 of the time to the first token")):
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(classes)), [_CLASS_LABELS[name] for name in classes])
        axes.set_xlabel("tokens of the prompt")
    highest = max(bar.get_height() for axes in (left, right) for bar in axes.patches)
    left.set_ylim(_LOWEST, 2 * highest)
    left.set_ylabel("seconds (logarithmic)")
    right.tick_params(labelleft=True)
    figure.suptitle(f"{rows[0].trace}, load {load:g}", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, title="order", frameon=False, loc="outside right center")
    return figure


def _bars(axes: Axes, values: dict[str, list[float]]) -> None:
    """Groups of bars with their heights written above them."""
    width = 0.84 / len(values)
    axes.set_yscale("log")
    for number, (order, heights) in enumerate(values.items()):
        colour, _, _, hatch = _LOOKS[order]
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(heights))]
        shown = [max(height, _LOWEST) for height in heights]
        axes.bar(
            places, shown, width * 0.92, bottom=0, color=colour, hatch=hatch, edgecolor="white",
            lw=0.3, label=order,
        )  # fmt: skip
        for place, height, top in zip(places, heights, shown, strict=True):
            axes.annotate(
                f"{height:.2g}" if height < 10 else f"{height:.0f}",
                (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", lw=0.4, color="#cccccc")
    axes.set_axisbelow(True)


def write_plots(rows: list[Row], folder: Path, at: float | None = None) -> list[Path]:
    """Write both files into a folder, which is made if need be. Raises ConfigError."""
    load = load_for_waits(rows, at)
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "Plots need matplotlib; install Lectern with its extra `plots`.", "plots"
        ) from error
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in (
            (ATTAINMENT, draw_attainment(rows)),
            (WAITS, draw_waits(rows, load)),
        ):
            path = folder / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be written: {error.strerror}.", "--out"
                ) from error
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.simulation.plots",
        description="Draw what `lectern simulate --trace FILE --load NUMBER --json` printed.",
    )
    parser.add_argument("rows", nargs="+", type=Path, help="files of rows, one trace")
    parser.add_argument("--out", required=True, type=Path, help="folder of the SVG files")
    parser.add_argument(
        "--at",
        type=float,
        help="load at which waits are drawn; default: the highest up to 1 that every order has",
    )
    given = parser.parse_args(arguments)
    try:
        for path in write_plots(read_rows(given.rows), given.out, given.at):
            print(path)
    except LecternError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
