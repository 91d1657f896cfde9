"""Predicts how long a stage takes for a micro-batch, and learns it from the steps it sees.

The time is linear in a few features of the micro-batch, as in DynaPipe (NeurIPS 2025): one group of
them counts once a layer, another once where the head is. Steps are weighed by 1 / time squared, so
that relative errors are least; old steps are forgotten exponentially; coefficients are never
negative. That is recursive least squares in its information form: what is kept is a small matrix.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.core import MicroBatch
from serving.driver.slots import SlotTable

Vector = NDArray[np.float64]


class StepFeatures(msgspec.Struct, frozen=True):
    """What a stage's time depends on.

    `new_tokens` prompt tokens; `prefill_context` pairs of a new token and a key it sees, the sum of
    n_i * L_i with L_i the mean keys of the n_i tokens; `decode_rows`, the keys they read in all,
    `decode_context`; `sampled` rows that get a token.
    """

    new_tokens: int
    prefill_context: float
    decode_rows: int
    decode_context: int
    sampled: int

    @classmethod
    def of(cls, batch: MicroBatch, slots: SlotTable) -> StepFeatures:
        """Of a micro-batch that was just chosen."""
        pairs = 0.0
        new = 0
        if len(batch.prefill_slots):
            ends = slots.planned[batch.prefill_slots].tolist()
            for length, end in zip(batch.prefill_lens.tolist(), ends, strict=True):
                new += length
                pairs += length * (end - (length - 1) / 2)
        rows = len(batch.decode_slots)
        keys = int(np.add.reduce(slots.planned[batch.decode_slots])) if rows else 0
        return cls(new, pairs, rows, keys, len(batch.sampled))


#: Sizes to which recorded steps are padded: 1, 2, 4, then by 8 to 64, by 16 to 256, by 64 to 512.
_BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 64))
#: Where the time of a layer may grow faster: until then reading weights decides, then products.
_BENDS = (64, 128, 256, 1024)
NUM_LAYER = 6 + len(_BENDS)
NUM_HEAD = 3


def padded(tokens: int) -> int:
    """The bucket of a step of so many tokens; larger ones run at their own size."""
    place = bisect_left(_BUCKETS, tokens)
    return _BUCKETS[place] if place < len(_BUCKETS) else tokens


def layer_vector(step: StepFeatures) -> Vector:
    """The features that count once a layer, each scaled to about 1 for a large step."""
    tokens = padded(step.new_tokens + step.decode_rows)
    bends = [max(0, tokens - bend) / 512 for bend in _BENDS]
    return np.array(
        [
            1.0,
            tokens / 512,
            *bends,
            step.new_tokens / 512,
            step.prefill_context / 1e6,
            step.decode_rows / 256,
            step.decode_context / 1e5,
        ]
    )


def head_vector(step: StepFeatures) -> Vector:
    """The features of head and sampling: whether there is any, rows, rows beyond 128."""
    rows = step.sampled
    return np.array([float(rows > 0), rows / 256, max(0, rows - 128) / 256])


class StagePredictor:
    """Of one stage. `layers` it owns; `has_head` on the last.

    Where every step draws as many tokens as it has rows, nothing tells the time of the head from
    that of the layers. So the stage with the head takes its layers to be like those of another
    stage with the same kind of device, `like`, as far as its own steps do not say otherwise.

    `error` is the mean relative error of late predictions, each made before its step was learnt
    from, or None before there were any.
    """

    #: A step's weight after n more is `memory` to the power n.
    memory = 0.998
    #: How strongly what is not seen any more stays as it was, as a share of what is.
    persistence = 1e-3
    #: A step counts as at most so many times the prediction: a hiccup says nothing of its size.
    most_surprise = 4.0
    _settled = 64
    _solve_every = 32

    def __init__(self, layers: int, *, has_head: bool) -> None:
        self.layers = layers
        self.has_head = has_head
        self.like: StagePredictor | None = None
        size = NUM_LAYER + NUM_HEAD
        self.seen = 0
        self.error: float | None = None
        self._known = False
        self._coefficients: Vector = np.zeros(size)
        self._information: NDArray[np.float64] = np.zeros((size, size))
        self._target: Vector = np.zeros(size)
        self._unsolved = 0
        self._least = np.inf
        self._most = 0.0

    def start_from(self, coefficients: Vector) -> None:
        """Begin with coefficients that were learnt before, of the same model and device."""
        self._coefficients = np.array(coefficients, dtype=np.float64)
        self._known = True

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self._known

    @property
    def coefficients(self) -> Vector:
        """Seconds by feature: those of one layer, then those of the head. Never negative.

        They follow the steps every few dozen of them.
        """
        if self._unsolved and not self._known:
            self._solve()
        return self._coefficients

    def vector(self, step: StepFeatures, layers: int | None = None) -> Vector:
        head = head_vector(step) if self.has_head else np.zeros(NUM_HEAD)
        return np.concatenate(((layers or self.layers) * layer_vector(step), head))

    def predict(self, step: StepFeatures) -> float:
        """Seconds; never negative, and never far outside what was seen."""
        return self._bounded(float(np.dot(self.vector(step), self.coefficients)))

    def observe(self, step: StepFeatures, seconds: float, layers: int | None = None) -> None:
        """Learn from a step that took so many seconds, with so many layers if not those of now.
        What is not above 0 is not counted."""
        if not 0 < seconds < np.inf:
            return
        vector = self.vector(step, layers)
        if self.seen >= self._solve_every or self._known:
            predicted = self._bounded(float(np.dot(vector, self._coefficients)))
            if predicted > 0:
                self._note_error(abs(predicted - seconds) / seconds)
                if self.seen >= self._settled:
                    seconds = min(seconds, self.most_surprise * predicted)
        self._least, self._most = min(self._least, seconds), max(self._most, seconds)
        vector /= seconds
        self._information *= self.memory
        self._information += np.outer(vector, vector)
        self._target *= self.memory
        self._target += vector
        self.seen += 1
        self._unsolved += 1
        if self._unsolved >= self._solve_every:
            self._solve()

    def layer_seconds(self, step: StepFeatures) -> float:
        """Of one layer."""
        return float(np.dot(layer_vector(step), self.coefficients[:NUM_LAYER]))

    def head_seconds(self, step: StepFeatures) -> float:
        """Of what stays with the last stage whatever layers it has."""
        return float(np.dot(head_vector(step), self.coefficients[NUM_LAYER:]))

    def _bounded(self, seconds: float) -> float:
        if not self.seen:
            return max(0.0, seconds)
        return min(max(seconds, self._least / 2), self._most * 16)

    def _note_error(self, error: float) -> None:
        error = min(error, 1.0)
        self.error = error if self.error is None else self.error + 0.01 * (error - self.error)

    def _solve(self) -> None:
        """Coefficients >= 0 of least weighed error, those without evidence left as they are."""
        size = np.diagonal(self._information)
        pull = self.persistence * (size + 1e-6 * size.max())
        matrix = self._information + np.diag(pull)
        before = self._coefficients.copy()
        if self.like is not None and self.like.known:
            before[:NUM_LAYER] = self.like.coefficients[:NUM_LAYER]
        target = self._target + pull * before
        self._coefficients = non_negative_solution(matrix, target)
        self._unsolved = 0
        self._known = True


def non_negative_solution(matrix: NDArray[np.float64], target: Vector) -> Vector:
    """The x >= 0 that makes x' A x / 2 - b' x least, for a positive definite A (active sets,
    Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23).
    """
    size = len(target)
    found = np.zeros(size)
    free = np.zeros(size, dtype=np.bool_)
    for _ in range(4 * size):
        slope = target - matrix @ found
        slope[free] = 0
        best = int(slope.argmax())
        if slope[best] <= 1e-9 * max(1.0, float(np.abs(target).max())):
            break
        free[best] = True
        while free.any():
            trial = np.zeros(size)
            trial[free] = np.linalg.solve(matrix[np.ix_(free, free)], target[free])
            if (trial[free] > 0).all():
                found = trial
                break
            # Go towards the trial until the first coefficient comes to 0, and hold that one.
            sinking = free & (trial <= 0)
            step = float((found[sinking] / (found[sinking] - trial[sinking] + 1e-300)).min())
            found = np.maximum(found + step * (trial - found), 0)
            stuck = sinking & (found <= 1e-300)
            free &= ~(stuck if stuck.any() else sinking)
            found[~free] = 0
    return found
