"""Step times measured at start: which loads, in how much time, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.core import SamplingParams
from serving.driver import kept_times, trial
from serving.driver.trial import Load, Trial, loads
from serving.messages import EngineStats, Progress, StepOutputs, Stop, Submit
from tests.serving.driver.fake import expected_output
from tests.serving.driver.threads import Client, StageThread


@pytest.fixture(autouse=True)
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageThread, "behave", lambda spec, message: None, raising=False)


@pytest.mark.parametrize(
    ("tokens", "seqs", "length", "pages"),
    [(2048, 256, 4096, 9000), (512, 3, 700, 100), (8, 1, 20, 2)],
)
def test_loads_have_all_sizes_that_fit(tokens: int, seqs: int, length: int, pages: int) -> None:
    found = loads(tokens, seqs, length, pages, 16)
    assert found == sorted(found, key=lambda load: load.tokens)
    assert len(set(found)) == len(found)
    for load in found:
        assert load.length + load.answer <= length
        assert load.rows * -(-(load.length + load.answer) // 16) <= pages
    assert max(load.length for load in found) >= min(tokens, length - 1) // 2
    if pages > 1000:
        assert max(load.rows for load in found) == seqs
        assert max(load.length for load in found if load.rows == 1) > tokens


def told(client: Client) -> list[str]:
    return [one.text for one in client.seen if isinstance(one, Progress)]


def test_times_are_measured_once_and_kept(directory: Path) -> None:
    with Client(directory, order="slo", profile_seconds=0.5, max_num_seqs=4) as client:
        client.ready()
        timings = client.driver._timings
        assert timings.known
        assert not timings.window
        assert timings.errors == [None]
        assert any(text.startswith("learnt from ") for text in told(client))
        steps = timings.predictors[0].seen
        assert steps > 20
        client.send(Submit(client.request(7, [1, 2, 3], 5)))
        client.until(lambda one: isinstance(one, StepOutputs) and bool(one.ended))
        wanted, _ = expected_output([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
        assert client.tokens[7] == wanted
        stats = client.until(lambda one: isinstance(one, EngineStats) and not one.in_flight)
        assert isinstance(stats, EngineStats)
        assert (stats.pages_used, stats.prompt_tokens) == (0, 3)
        client.send(Stop())
        assert client.failure() is None
    kept = kept_times.read(kept_times.path("fake", "thread", "fake"))
    assert kept is not None
    assert any(kept.layer)


def test_what_is_known_is_not_measured_again(directory: Path) -> None:
    kept_times.write(
        kept_times.path("fake", "thread", "fake"),
        kept_times.KeptTimes(model="fake", device="thread", dtype="fake", layers=4,
                             layer=[0.001] + [0.0] * 9, head=[0.0] * 3),
    )  # fmt: skip
    with Client(directory, order="slo", profile_seconds=0.5) as client:
        client.ready()
        assert not any("measuring" in text for text in told(client))
        client.send(Stop())
        assert client.failure() is None


@pytest.mark.parametrize("settings", [{"order": "fcfs"}, {"order": "slo", "profile_seconds": 0.0}])
def test_nothing_is_measured_where_nothing_depends_on_it(
    directory: Path, settings: dict[str, object]
) -> None:
    with Client(directory, **({"profile_seconds": 0.5} | settings)) as client:
        client.ready()
        assert not any("measuring" in text for text in told(client))
        client.send(Stop())
        assert client.failure() is None


def test_every_stage_is_measured(directory: Path) -> None:
    """Of stages with the same device none is left out, and each has its own layers."""
    with Client(directory, pipeline_parallel_size=2, order="slo", profile_seconds=0.5) as client:
        client.ready()
        for predictor in client.driver._timings.predictors:
            assert predictor.known
            assert predictor.seen > 20
            assert predictor.coefficients.min() >= 0
            assert np.isfinite(predictor.coefficients).all()
        client.send(Stop())
        assert client.failure() is None


def test_loads_that_would_take_too_long_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 10 ms a token gets to small loads only; all rounds end in time."""
    now = [0.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: now[0])
    ran = []
    found = [Load(1, size, 1) for size in (10, 20, 40, 80, 1600)]
    for load in Trial._in_time(Trial.__new__(Trial), found, 4.0):
        ran.append(load.length)
        now[0] += 0.01 * load.tokens
    assert now[0] <= 4.0
    assert set(ran) == {10, 20, 40, 80}
