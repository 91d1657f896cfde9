"""How long a stage takes for a micro-batch: a few measured curves of one model on one device."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import msgspec
import numpy as np

from serving.driver import kept_times
from serving.driver.kept_times import KeptTimes
from serving.driver.predictor import StepFeatures, head_vector, layer_vector
from serving.errors import ConfigError

_FOLDER = Path(__file__).parent / "profiles"

Curve = list[tuple[float, float]]


class Profile(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Seconds of the parts of a step.

    `layer_s` [tokens, seconds] of one layer without attention over earlier keys; `decode_key_s` for
    each key that a decode row reads in one layer; `prefill_pair_s` for each pair of new token and
    key in one layer; `head_s` [rows, seconds] of head and sampling; `step_s` a stage and
    micro-batch. Between stages: `link_s` and `link_token_s` for each token; `token_return_s` from
    the last stage to the first. `plan_s` is the driver's work for a plan, `news_s` the way of a
    result to the driver and of a plan to a stage. `source` says where the figures are from.
    """

    name: str
    source: str
    layers: int
    layer_s: Curve
    decode_key_s: float
    prefill_pair_s: float
    head_s: Curve
    step_s: float = 0.0
    link_s: float = 0.0
    link_token_s: float = 0.0
    token_return_s: float = 0.0
    plan_s: float = 0.0
    news_s: float = 0.0

    def stage_seconds(self, features: StepFeatures, layers: int, *, last: bool) -> float:
        """Seconds that a stage of so many layers needs for one micro-batch."""
        layer = (
            interpolate(self.layer_s, features.new_tokens + features.decode_rows)
            + self.decode_key_s * features.decode_context
            + self.prefill_pair_s * features.prefill_context
        )
        head = interpolate(self.head_s, features.sampled) if last and features.sampled else 0.0
        return self.step_s + layers * layer + head

    @classmethod
    def load(cls, name: str) -> Profile:
        """A profile by name, or from a JSON file: one like these, or step times that an engine has
        learnt and kept (`serving/driver/kept_times.py`). Raises ConfigError."""
        path = _FOLDER / f"{name}.json"
        if not path.is_file():
            path = Path(name)
        learnt = kept_times.read(path)
        if learnt is not None:
            return LearntProfile.of(learnt)
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
            if found.layers < 1 or min(len(found.layer_s), len(found.head_s)) < 2:
                raise msgspec.ValidationError("it needs a layer and two points of every curve")
            return found
        except (OSError, msgspec.DecodeError) as error:
            known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
            raise ConfigError(
                f"--profile {name!r} is neither one of {known} nor a profile file ({error}).",
                "--profile",
            ) from error


class LearntProfile(Profile, kw_only=True, frozen=True):
    """Step times as an engine's predictors learnt them: seconds by feature, of one layer and of the
    head. What they do not know, links and the driver's work, costs nothing.
    """

    layer_s: Curve = []
    head_s: Curve = []
    decode_key_s: float = 0.0
    prefill_pair_s: float = 0.0
    layer: list[float]
    head: list[float]

    @classmethod
    def of(cls, kept: KeptTimes) -> LearntProfile:
        return cls(
            name=kept.model,
            source=f"learnt on {kept.device}, {kept.dtype}",
            layers=kept.layers,
            layer=kept.layer,
            head=kept.head,
        )

    def stage_seconds(self, features: StepFeatures, layers: int, *, last: bool) -> float:
        seconds = layers * float(np.dot(self.layer, layer_vector(features)))
        return seconds + (float(np.dot(self.head, head_vector(features))) if last else 0.0)


def interpolate(curve: Curve, at: float) -> float:
    """The piecewise linear curve at a place; its last piece goes on for ever."""
    place = bisect_left(curve, (at,))
    if place == 0:
        return curve[0][1]
    (left, low), (right, high) = curve[place - 1 : place + 1] if place < len(curve) else curve[-2:]
    return low + (high - low) * (at - left) / (right - left)
