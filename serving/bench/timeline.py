"""A picture of what each pipeline stage did over time: one row a stage, one box a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from serving.errors import ConfigError

#: Micro-batches that are drawn unless a window is asked for, and that are drawn at most.
USUAL, MOST = 60, 2000


@dataclass(frozen=True)
class Batch:
    """A micro-batch: decodes and prompt tokens it held, and its layout's epoch.

    `work[stage]` are the seconds from the start of the run at which a stage, having its input,
    began to work on it, and at which it was done.
    """

    number: int
    decodes: int
    prompt_tokens: int
    epoch: int
    work: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Window:
    """A part of a run, in seconds: `length` of them from `start`, or about the middle, or the usual
    number of micro-batches there. Where the layout changes, the first change is the middle.
    """

    start: float | None = None
    length: float | None = None

    @classmethod
    def parse(cls, text: str) -> Window:
        """Of SECONDS or START:END, or the usual one. Raises ConfigError."""
        if not text:
            return cls()
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1 and 0 < numbers[0] < math.inf:
            return cls(length=numbers[0])
        if len(numbers) == 2 and 0 <= numbers[0] < numbers[1] < math.inf:
            return cls(numbers[0], numbers[1] - numbers[0])
        raise ConfigError(
            "--timeline-window must be seconds such as 0.5, or START:END such as 2:3.5, not "
            f"{text!r}.",
            "--timeline-window",
        )

    def of(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Its beginning and end in a run of these micro-batches."""
        over = max(batch.work[-1][1] for batch in batches)
        if self.start is not None and self.length is not None:
            return self.start, self.start + self.length
        changes = _changes(batches)
        middle = changes[0] if changes else len(batches) // 2
        if self.length is not None:
            first = batches[0].work[0][0]
            at = batches[middle].work[0][0] if changes else (first + over) / 2
            begin = max(first, at - self.length / 2)
            return begin, begin + self.length
        begin = max(0, min(middle - USUAL // 2, len(batches) - USUAL))
        end = begin + USUAL
        return batches[begin].work[0][0], batches[end].work[0][0] if end < len(batches) else over


@dataclass(frozen=True)
class Picture:
    """What --timeline and --timeline-window ask for."""

    path: Path
    window: Window

    @classmethod
    def asked(cls, path: str, window: str, runs: int) -> Picture | None:
        """None if there shall be none. Raises ConfigError, also if it would be of several runs."""
        if not path:
            if window:
                raise ConfigError(
                    "--timeline-window belongs to --timeline; give a file with it.",
                    "--timeline-window",
                )
            return None
        if runs != 1:
            raise ConfigError(
                f"--timeline draws one run, and {runs} are asked for; leave one of them.",
                "--timeline",
            )
        if Path(path).suffix.lower() != ".svg":
            raise ConfigError(
                f"--timeline writes SVG; give a name that ends in .svg, not {path!r}.", "--timeline"
            )
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"The folder of --timeline {path} does not exist.", "--timeline")
        if Path(path).is_dir():
            raise ConfigError(
                f"--timeline {path} is a folder; give the name of a file.", "--timeline"
            )
        return cls(Path(path), Window.parse(window))

    def write(
        self, batches: Sequence[Batch], layouts: Mapping[int, Sequence[int]], title: str
    ) -> None:
        """Raises ConfigError if nothing is in the window or the file cannot be written."""
        drawn = draw(batches, layouts, title, self.window)
        try:
            self.path.write_bytes(drawn)
        except OSError as error:
            raise ConfigError(
                f"--timeline {self.path} cannot be written: {error.strerror}.", "--timeline"
            ) from error


def counts_text(counts: Sequence[int]) -> str:
    """Such as 10/9/9/8."""
    return "/".join(map(str, counts))


def draw(
    batches: Sequence[Batch],
    layouts: Mapping[int, Sequence[int]],
    title: str,
    window: Window | None = None,
) -> bytes:
    """An SVG file. `layouts` has the layers of each stage by epoch. Raises ConfigError if there is
    nothing to draw.
    """
    if not batches:
        raise ConfigError("There is no micro-batch to draw a timeline of.", "--timeline")
    batches = sorted(batches, key=lambda batch: batch.number)
    over = max(batch.work[-1][1] for batch in batches)
    begin, end = (window or Window()).of(batches)
    shown = [batch for batch in batches if batch.work[-1][1] > begin and batch.work[0][0] < end]
    if not shown:
        raise ConfigError(
            f"No micro-batch ran from {begin:g} s to {end:g} s; the run has them from "
            f"{batches[0].work[0][0]:.3g} s to {over:.3g} s.",
            "--timeline-window",
        )
    end = min(end, over)
    part = f"{len(shown)} of {len(batches)} micro-batches"
    if len(shown) > MOST:
        shown, end = shown[:MOST], shown[MOST].work[0][0]
        part += f", cut off after {MOST}"
    subtitle = f"shown: {begin:.3f} s to {end:.3f} s of a run of {over:.3f} s; {part}"
    canvas = _Canvas(begin, end, shown)
    canvas.head(title, subtitle)
    canvas.rows(layouts)
    for place in _changes(shown):
        before, after = (layouts.get(batch.epoch, ()) for batch in shown[place - 1 : place + 1])
        canvas.change(shown[place], f"{counts_text(before)} → {counts_text(after)}")
    canvas.axis()
    return canvas.file()


def _changes(batches: Sequence[Batch]) -> list[int]:
    """Places of the first micro-batches of new layouts."""
    return [n for n in range(1, len(batches)) if batches[n].epoch > batches[n - 1].epoch]


#: Of very different lightness, so that grey prints can be read.
_DECODE, _PROMPT, _LANE, _INK, _FAINT, _MARK = (
    "#f2b53a", "#1d4e89", "#ececec", "#222222", "#666666", "#b3261e",
)  # fmt: skip
_WIDTH, _LEFT, _RIGHT = 1280, 96, 76
_TOP, _ROW, _BOX, _LABEL = 118, 58, 36, 12
#: Pixels of one digit above a box.
_DIGIT = 6.0


class _Canvas:
    """Pixels: x grows with time, y with the stages. What it writes is escaped by ElementTree."""

    def __init__(self, begin: float, end: float, shown: Sequence[Batch]) -> None:
        self._begin, self._end, self._shown = begin, end, shown
        self._stages = len(shown[0].work)
        width = _WIDTH - _LEFT - _RIGHT
        self._scale = width / (end - begin)
        self._digits = len(str(shown[-1].number)) + 1
        #: One box in so many has its number above it, the same ones on every stage.
        self._every = math.ceil(_round_step(self._digits * _DIGIT * len(shown) / width))
        self._bottom = _TOP + self._stages * _ROW
        height = self._bottom + 58
        self._svg = ElementTree.Element(
            "svg",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_WIDTH} {height}",
            width=str(_WIDTH),
            height=str(height),
            role="img",
        )
        self._svg.set("font-family", "DejaVu Sans, Helvetica, Arial, sans-serif")
        self._rectangle(0, 0, _WIDTH, height, "#ffffff")

    def file(self) -> bytes:
        ElementTree.indent(self._svg, "")
        text: bytes = ElementTree.tostring(self._svg, encoding="utf-8", xml_declaration=True)
        return text + b"\n"

    def head(self, title: str, subtitle: str) -> None:
        printable = "".join(letter for letter in title if letter.isprintable())
        named = ElementTree.Element("title")
        named.text = printable
        self._svg.insert(0, named)
        self._text(_LEFT, 24, printable, size=15, weight="bold")
        self._text(_LEFT, 43, subtitle, size=12, fill=_FAINT)
        x = float(_LEFT)
        for share, words in (
            (0.0, "decodes (one token of each answer)"),
            (1.0, "prompt tokens"),
            (0.5, "both, by their share of the tokens"),
            (None, "bubble: the stage waits"),
        ):
            self._rectangle(x, 56, 22, 14, _LANE if share is None else _DECODE, {"stroke": "#999"})
            if share:
                self._rectangle(x, 56 + 14 * (1 - share), 22, 14 * share, _PROMPT)
            self._text(x + 28, 67.5, words, size=12)
            x += 60 + 6.4 * len(words)

    def rows(self, layouts: Mapping[int, Sequence[int]]) -> None:
        """A lane, the boxes and the share of busy time of each stage."""
        counts = layouts.get(self._shown[0].epoch, ())
        self._text(_WIDTH - _RIGHT + 10, _TOP + 4, "busy", size=11, fill=_FAINT)
        for stage in range(self._stages):
            top = self._top(stage)
            self._text(_LEFT - 12, top + 16, f"stage {stage}", size=13, anchor="end")
            if stage < len(counts):
                layers = f"{counts[stage]} layer{'s' * (counts[stage] != 1)}"
                self._text(_LEFT - 12, top + 31, layers, size=11, anchor="end", fill=_FAINT)
            self._rectangle(_LEFT, top, _WIDTH - _LEFT - _RIGHT, _BOX, _LANE)
            self._free = 0.0  # where the next number may begin
            busy = sum(self._box(batch, stage) for batch in self._shown)
            share = f"{min(100.0, 100 * busy / (self._end - self._begin)):.0f} %"
            self._text(_WIDTH - _RIGHT + 10, top + 23, share, size=13, weight="bold")

    def _box(self, batch: Batch, stage: int) -> float:
        """Returns the seconds of it that lie in the window."""
        began, ended = batch.work[stage]
        left, right = max(began, self._begin), min(ended, self._end)
        if right <= left:
            return 0.0
        x, width, top = self._x(left), (right - left) * self._scale, self._top(stage)
        box = ElementTree.SubElement(self._svg, "g")
        ElementTree.SubElement(box, "title").text = (
            f"micro-batch {batch.number} on stage {stage}: {batch.decodes} decodes, "
            f"{batch.prompt_tokens} prompt tokens, {1000 * (ended - began):.2f} ms "
            f"({1000 * began:.2f} to {1000 * ended:.2f})"
        )
        # A dark hair tells boxes apart that follow at once; a bubble is light.
        edge = {"stroke": _INK, "stroke-width": "0.5"} if width > 3 else {}
        tokens = batch.decodes + batch.prompt_tokens
        part = _BOX * batch.prompt_tokens / tokens if tokens else 0.0
        if part < _BOX:
            self._rectangle(x, top, width, _BOX, _DECODE, edge, box)
        if part:
            self._rectangle(x, top + _BOX - part, width, part, _PROMPT, edge, box)
        half = self._digits * _DIGIT / 2
        if batch.number % self._every == 0 and x + width / 2 - half >= self._free:
            self._free = x + width / 2 + half
            self._text(x + width / 2, top - 3, str(batch.number), size=9, anchor="middle",
                       fill=_FAINT, parent=box)  # fmt: skip
        return right - left

    def change(self, batch: Batch, label: str) -> None:
        """A line down the stages: each changes its layers when it comes to this micro-batch."""
        corners = [(self._x(batch.work[0][0]), _TOP - 14.0)]
        for stage, (began, _) in enumerate(batch.work):
            top = self._top(stage)
            corners += [(self._x(began), top - _LABEL), (self._x(began), top + _BOX)]
        line = " ".join(f"{min(x, _WIDTH - _RIGHT):.2f},{y:.2f}" for x, y in corners)
        ElementTree.SubElement(
            self._svg,
            "polyline",
            {
                "points": line,
                "fill": "none",
                "stroke": _MARK,
                "stroke-width": "1.6",
                "stroke-dasharray": "5 3",
            },
        )
        x = corners[0][0]
        anchor = "start" if x < _WIDTH / 4 else "end" if x > 3 * _WIDTH / 4 else "middle"
        self._text(x, _TOP - 19, label, size=12, weight="bold", anchor=anchor, fill=_MARK)

    def axis(self) -> None:
        """Milliseconds from the start of the run, at round numbers."""
        step = _round_step(1000 * (self._end - self._begin) / 12)
        digits = max(0, -math.floor(math.log10(step)))
        y, mark = self._bottom, math.ceil(1000 * self._begin / step)
        self._line(_LEFT, y, _WIDTH - _RIGHT, y)
        while mark * step <= 1000 * self._end:
            x = self._x(mark * step / 1000)
            self._line(x, y, x, y + 5)
            self._text(x, y + 19, f"{mark * step:,.{digits}f}", size=11, anchor="middle")
            mark += 1
        words = "ms since the run began; the number above a box is that of its micro-batch"
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, y + 42, words, size=12, anchor="middle")

    def _x(self, seconds: float) -> float:
        return _LEFT + (seconds - self._begin) * self._scale

    def _top(self, stage: int) -> float:
        return _TOP + stage * _ROW + _LABEL

    def _line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        attributes = {name: f"{value:.2f}" for name, value in ends.items()}
        ElementTree.SubElement(self._svg, "line", {**attributes, "stroke": _INK})

    def _rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        more: Mapping[str, str] | None = None,
        parent: ElementTree.Element | None = None,
    ) -> None:
        sizes = {"x": x, "y": y, "width": width, "height": height}
        attributes = {name: f"{value:.2f}" for name, value in sizes.items()}
        parent = self._svg if parent is None else parent
        ElementTree.SubElement(parent, "rect", {**attributes, "fill": fill, **(more or {})})

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        fill: str = _INK,
        anchor: str = "start",
        weight: str = "normal",
        parent: ElementTree.Element | None = None,
    ) -> None:
        attributes = {"x": f"{x:.2f}", "y": f"{y:.2f}", "font-size": str(size), "fill": fill}
        if anchor != "start":
            attributes["text-anchor"] = anchor
        if weight != "normal":
            attributes["font-weight"] = weight
        parent = self._svg if parent is None else parent
        ElementTree.SubElement(parent, "text", attributes).text = text


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 ... and their tenths that is not below `least`."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
