"""The picture of what stages did, from given micro-batches, and what an engine tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from serving.bench import recording
from serving.bench.recording import Recording
from serving.bench.timeline import MOST, USUAL, Batch, Picture, Window, draw
from serving.errors import ConfigError, EngineDeadError
from serving.messages import StageSteps, StepPlanned, StepTime

SVG = "{http://www.w3.org/2000/svg}"


def batches(
    count: int, stages: int = 2, *, changes: Sequence[int] = (), gap: float = 0.0
) -> list[Batch]:
    """Steps of 10 ms, a stage after the other, with gaps in between; prompts in every third."""
    made = []
    for number in range(count):
        starts = [number * (0.01 + gap) + stage * 0.01 for stage in range(stages)]
        epoch = sum(number >= change for change in changes)
        prompt = 300 if number % 3 == 0 else 0
        made.append(Batch(number, 100, prompt, epoch, [(at, at + 0.01) for at in starts]))
    return made


class Drawn:
    """An SVG file taken apart."""

    def __init__(self, data: bytes) -> None:
        root = ElementTree.fromstring(data)
        self.title = root.findtext(f"{SVG}title")
        self.texts = [one.text or "" for one in root.iter(f"{SVG}text")]
        self.lines = [one.get("points", "").split() for one in root.iter(f"{SVG}polyline")]
        #: (number, stage) -> its rectangles: x, y, width, height, colour.
        self.boxes: dict[tuple[int, int], list[tuple[float, float, float, float, str]]] = {}
        for group in root.iter(f"{SVG}g"):
            words = (group.findtext(f"{SVG}title") or "").split()
            place = int(words[1]), int(words[4].rstrip(":"))
            assert place not in self.boxes
            self.boxes[place] = [
                (*(float(box.get(name, "nan")) for name in ("x", "y", "width", "height")),  # type: ignore[misc]
                 box.get("fill", ""))
                for box in group.iter(f"{SVG}rect")
            ]  # fmt: skip

    def span(self, number: int, stage: int) -> tuple[float, float]:
        x, _, width, *_ = self.boxes[number, stage][0]
        return x, x + width


def drawn(made: Sequence[Batch], window: str = "", layouts: Any = None, title: str = "t") -> Drawn:
    return Drawn(draw(made, layouts or {0: [5, 4]}, title, Window.parse(window)))


def test_boxes_are_where_and_as_wide_as_the_work_was() -> None:
    found = drawn(batches(8, gap=0.005), "0:0.2")
    assert set(found.boxes) == {(number, stage) for number in range(8) for stage in range(2)}
    scale = (found.span(4, 0)[0] - found.span(0, 0)[0]) / 0.06
    for number in range(8):
        for stage in range(2):
            left, right = found.span(number, stage)
            begin = found.span(0, 0)[0] + scale * (0.015 * number + 0.01 * stage)
            assert (left, right) == pytest.approx((begin, begin + scale * 0.01), abs=0.02)
    # What is between two boxes of a row is a bubble of 5 ms.
    assert found.span(3, 1)[0] - found.span(2, 1)[1] == pytest.approx(scale * 0.005, abs=0.03)
    rows = {stage: {box[1] for (_, at), (box, *_) in found.boxes.items() if at == stage}
            for stage in range(2)}  # fmt: skip
    assert max(rows[0]) < min(rows[1])
    assert found.texts.count("64 %") == 2  # 80 ms of 125
    assert {"stage 0", "5 layers", "stage 1", "4 layers", "0", "20", "120"} <= set(found.texts)


def test_a_box_shows_the_shares_of_decodes_and_prompt_tokens() -> None:
    found = drawn(batches(3), "0:1")
    both, decodes = found.boxes[0, 0], found.boxes[1, 0]
    assert len(both) == 2
    whole, part = both
    assert part[3] == pytest.approx(0.75 * whole[3])
    assert part[1] + part[3] == pytest.approx(whole[1] + whole[3])
    assert [box[4] for box in decodes] == [whole[4]]
    assert part[4] != whole[4]
    (only,) = drawn([Batch(0, 0, 64, 0, [(0.0, 1.0)])]).boxes[0, 0]
    assert (only[3], only[4]) == (pytest.approx(whole[3]), part[4])


def test_a_new_layout_is_a_line_through_the_micro_batch_that_begins_it() -> None:
    layouts = {0: [9, 9], 1: [10, 8]}
    found = drawn(batches(200, changes=[150]), layouts=layouts)
    assert "9/9 → 10/8" in found.texts
    (line,) = found.lines
    xs = [float(point.split(",")[0]) for point in line]
    first, second = found.span(150, 0)[0], found.span(150, 1)[0]
    assert xs == pytest.approx([first] * 3 + [second] * 2, abs=0.02)
    # The usual window lies about it, not about the middle of the run.
    assert min(found.boxes)[0] == 150 - USUAL // 2 - 1
    assert not drawn(batches(200, changes=[150]), "0:1", layouts).lines
    assert len(drawn(batches(90, changes=[30, 60]), "0:2", layouts).lines) == 2


@pytest.mark.parametrize(
    ("window", "shown", "said"),
    [
        ("", range(69, 130), "0.700 s to 1.300 s of a run of 2.010 s; 61 of 200"),
        ("0.1", range(94, 106), "0.955 s to 1.055 s"),
        ("0.305:0.325", range(29, 33), "0.305 s to 0.325 s of a run of 2.010 s; 4 of 200"),
        ("1.985:9", range(197, 200), "1.985 s to 2.010 s of a run of 2.010 s; 3 of 200"),
        ("100", range(200), "0.000 s to 2.010 s of a run of 2.010 s; 200 of 200"),
    ],
)
def test_only_the_window_is_drawn_and_named(window: str, shown: range, said: str) -> None:
    found = drawn(list(reversed(batches(200))), window)
    assert sorted({number for number, _ in found.boxes}) == list(shown)
    assert any(said in text for text in found.texts)
    left = min(box[0] for boxes in found.boxes.values() for box in boxes)
    right = max(box[0] + box[2] for boxes in found.boxes.values() for box in boxes)
    assert 96 <= left < right <= 1280 - 76 + 0.01


def test_a_long_window_is_cut_off_and_that_is_said() -> None:
    data = draw(batches(5000, stages=4), {}, "long", Window.parse("0:60"))
    assert len(data) < 5_000_000
    found = Drawn(data)
    assert len({number for number, _ in found.boxes}) == MOST
    assert any(f"cut off after {MOST}" in text for text in found.texts)
    assert any("0.000 s to 20.000 s" in text for text in found.texts)


def test_titles_are_escaped() -> None:
    title = 'a<b>&"c"\x00\x1b</text>'
    found = drawn(batches(3), title=title)
    assert found.title == 'a<b>&"c"</text>'
    assert found.title in found.texts


def test_nothing_to_draw_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="no micro-batch to draw"):
        draw([], {0: [1]}, "none")
    with pytest.raises(ConfigError, match=r"No micro-batch ran from 5 s to 6 s.*0 s to 0\.05"):
        drawn(batches(4), "5:6")


@pytest.mark.parametrize("text", ["x", "0", "-1", "inf", "nan", "2:1", "1:1", "-1:2", "1:2:3", ":"])
def test_bad_windows_are_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Window.parse(text)
    assert caught.value.flag == "--timeline-window"
    assert repr(text) in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    for path, runs, part in (
        (tmp_path / "a.png", 1, "ends in .svg"),
        (tmp_path / "no" / "a.svg", 1, "does not exist"),
        (tmp_path / "a.svg", 2, "draws one run, and 2 are asked for"),
    ):
        with pytest.raises(ConfigError, match=part) as caught:
            Picture.asked(str(path), "", runs)
        assert caught.value.flag == "--timeline"
    picture = Picture.asked(str(tmp_path / "folder.svg"), "", 1)
    assert picture is not None
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        Picture.asked(str(tmp_path / "folder.svg"), "", 1)
    with pytest.raises(ConfigError, match="cannot be written"):
        picture.write(batches(3), {0: [5, 4]}, "t")
    assert Picture.asked("", "", 5) is None


def times(number: int, began: float) -> StepTime:
    return StepTime(number, 0.01, began, began + 0.01)


async def test_a_recording_joins_plans_and_reports() -> None:
    record = Recording(2)
    for number in range(3):
        record.take(StepPlanned(number, number // 2, 5 + number, 7))
    record.take(StageSteps(0, [times(0, 9.0), times(1, 10.0), times(2, 10.5)]))
    # That of stage 1 never came for the first; one that was not planned by this driver came.
    record.take(StageSteps(1, [times(-1, 1.0), times(1, 10.25), times(2, 11.0)]))
    found = await record.batches(10.0)
    assert [(one.number, one.decodes, one.prompt_tokens, one.epoch) for one in found] == [
        (1, 6, 7, 0),
        (2, 7, 7, 1),
    ]
    assert list(found[0].work) == [(0.0, pytest.approx(0.01)), (0.25, pytest.approx(0.26))]
    assert [one.number for one in await record.batches(10.25)] == [2]


async def test_a_stage_that_never_reports_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_PATIENCE_S", 0.01)
    record = Recording(1)
    assert await record.batches(0.0) == []
    record.take(StepPlanned(0, 0, 1, 0))
    with pytest.raises(EngineDeadError, match="no timeline"):
        await record.batches(0.0)
