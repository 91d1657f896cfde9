"""Step times that were learnt in one run and are of use in the next, and to the simulator.

They lie in `$LECTERN_HOME/cache/step-times` (or `~/.cache/lectern/step-times`), a file for each
model, device and number type.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from serving.driver.predictor import NUM_HEAD, NUM_LAYER

_VERSION = 2


class KeptTimes(msgspec.Struct, kw_only=True, frozen=True):
    """Seconds by feature, of one layer and of the head (`serving/driver/predictor.py`). `model`,
    `device` and `dtype` are what they were measured with, `layers` what the model has.
    """

    version: int = _VERSION
    model: str
    device: str
    dtype: str
    layers: int
    layer: list[float]
    head: list[float]


def folder() -> Path:
    """Where the files are."""
    home = os.environ.get("LECTERN_HOME")
    if home:
        return Path(home).expanduser() / "cache" / "step-times"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lectern" / "step-times"


def path(model: str, device: str, dtype: str) -> Path:
    """The file of a model on a device."""
    key = hashlib.blake2b(repr((model, device, dtype)).encode(), digest_size=6).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{model}-{device}-{dtype}")[:80]
    return folder() / f"{readable}-{key}.json"


def read(file: Path) -> KeptTimes | None:
    """What a file holds; None if there is none, or one of another version."""
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=KeptTimes)
    except (OSError, msgspec.DecodeError):
        return None
    numbers = np.array([*kept.layer, *kept.head])
    fits = len(kept.layer) == NUM_LAYER and len(kept.head) == NUM_HEAD and kept.layers > 0
    if kept.version != _VERSION or not fits or not np.isfinite(numbers).all() or numbers.min() < 0:
        return None
    return kept


def write(file: Path, kept: KeptTimes) -> None:
    """Replace the file in one step, so that a reader never sees half of it. A disk that cannot be
    written costs only this.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as made:
            made.write(msgspec.json.encode(kept))
        os.replace(made.name, file)
    except OSError:
        return  # it is learnt again next time
