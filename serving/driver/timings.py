"""Matches the stages' step times with what their micro-batches held, and teaches the predictors."""

from __future__ import annotations

from collections import deque

import numpy as np

from serving.core import Layout, MicroBatch
from serving.driver import kept_times
from serving.driver.kept_times import KeptTimes
from serving.driver.predictor import NUM_LAYER, StagePredictor, StepFeatures
from serving.driver.slots import SlotTable
from serving.messages import StepTime

_MOST_PENDING = 4096
#: Steps of one report that are learnt from, the newest: nothing is planned meanwhile.
_MOST_LEARNT = 64
_WORTH_KEEPING = 1000  # steps
_WINDOW = 256
_LAYOUTS = 16


class StepTimings:
    """One predictor a stage, fed by what the driver sends and hears."""

    def __init__(self, layout: Layout) -> None:
        last = layout.num_stages - 1
        self._layouts: deque[tuple[int, Layout]] = deque([(0, layout)])
        #: Features of late micro-batches, for the balancer.
        self.window: deque[StepFeatures] = deque(maxlen=_WINDOW)
        self.predictors = [
            StagePredictor(len(layout.layers(stage)), has_head=stage == last)
            for stage in range(last + 1)
        ]
        self._pending: dict[int, tuple[StepFeatures, int]] = {}
        #: Of the time between two results, which is that of the slowest stage while all are busy:
        #: until all stages have reported some times.
        self._between = StagePredictor(1, has_head=True)
        self._last_result = 0.0

    @property
    def errors(self) -> list[float | None]:
        """Mean relative error of each stage's predictions, None where there was none yet."""
        return [predictor.error for predictor in self.predictors]

    @property
    def known(self) -> bool:
        """Whether every stage's times can be predicted."""
        return all(predictor.known for predictor in self.predictors)

    @property
    def pending(self) -> bool:
        """Whether there are micro-batches whose times some stage has not told."""
        return bool(self._pending)

    def settle(self) -> None:
        """Take what was learnt so far as a beginning: errors count from now on, and micro-batches
        of a trial say nothing about the load."""
        for predictor in self.predictors:
            predictor.error = None
        self.window.clear()

    def sent(self, batch: MicroBatch, slots: SlotTable) -> None:
        """A micro-batch was chosen just now."""
        if len(self._pending) >= _MOST_PENDING:  # no stage reports times
            self._pending.pop(next(iter(self._pending)))
        features = StepFeatures.of(batch, slots)
        self._pending[batch.number] = (features, len(self.predictors))
        self.window.append(features)

    def forget_sent(self) -> None:
        """The stages are gone: what was sent will not return, and its numbers come again."""
        self._pending.clear()
        self._layouts = deque([(0, self._layouts[-1][1])])

    def returned(self, batch: MicroBatch, now: float) -> None:
        """The result of a micro-batch came."""
        found = self._pending.get(batch.number)
        waited = batch.sent_at < self._last_result
        if found is not None and (waited or len(self.predictors) == 1):
            self._between.observe(found[0], now - max(batch.sent_at, self._last_result))
        self._last_result = now

    def slowest(self, features: StepFeatures) -> float | None:
        """Predicted seconds of the slowest stage; None while nothing is known of some stage."""
        if self.known:
            return max(predictor.predict(features) for predictor in self.predictors)
        return self._between.predict(features) if self._between.known else None

    def took(self, stage: int, steps: list[StepTime], most: int = _MOST_LEARNT) -> None:
        """A stage has worked on these micro-batches; the last `most` are learnt from."""
        for left, step in enumerate(steps, -len(steps)):
            found = self._pending.pop(step.number, None)
            if found is None:
                continue
            features, stages = found
            if stages > 1:
                self._pending[step.number] = (features, stages - 1)
            if left >= -most:
                layers = len(self._layout_of(step.number).layers(stage))
                self.predictors[stage].observe(features, step.busy, layers)

    def relayout(self, first: int, layout: Layout) -> None:
        """Micro-batches from number `first` on run with another layout."""
        self._layouts.append((first, layout))
        if len(self._layouts) > _LAYOUTS:
            self._layouts.popleft()
        for stage, predictor in enumerate(self.predictors):
            predictor.layers = len(layout.layers(stage))

    def _layout_of(self, number: int) -> Layout:
        """The layout of a micro-batch, or the oldest that is remembered."""
        for first, layout in reversed(self._layouts):
            if first <= number:
                return layout
        return self._layouts[0][1]

    # ---- between runs

    def load(self, model: str, devices: list[str], dtype: str) -> bool:
        """Start from what was learnt in earlier runs; whether there was anything, for any stage."""
        any_found = False
        *others, last = zip(self.predictors, devices, strict=True)
        last[0].like = next((one for one, device in others if device == last[1]), None)
        for predictor, device in zip(self.predictors, devices, strict=True):
            kept = kept_times.read(kept_times.path(model, device, dtype))
            if kept is not None:
                predictor.start_from(np.array([*kept.layer, *kept.head]))
                any_found = True
        return any_found

    def save(self, model: str, devices: list[str], dtype: str, least: int = _WORTH_KEEPING) -> None:
        """Keep what stages learnt that saw at least so many steps. A device of several stages
        is written by the one that saw most; the head's part comes from the last stage, or stays as
        it was where that one is elsewhere.
        A disk that cannot be written costs only this.
        """
        for device in dict.fromkeys(devices):
            stages = [
                predictor
                for predictor, its in zip(self.predictors, devices, strict=True)
                if its == device and predictor.seen >= least
            ]
            if not stages:
                continue
            path = kept_times.path(model, device, dtype)
            head = stages[-1].coefficients[NUM_LAYER:].tolist()
            if not stages[-1].has_head and (before := kept_times.read(path)) is not None:
                head = before.head
            best = max(stages, key=lambda predictor: (not predictor.has_head, predictor.seen))
            kept = KeptTimes(
                model=model,
                device=device,
                dtype=dtype,
                layers=self._layouts[-1][1].bounds[-1],
                layer=best.coefficients[:NUM_LAYER].tolist(),
                head=head,
            )
            kept_times.write(path, kept)
