"""Batches out of shards: made beforehand, or by a generator that runs beside the training."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from serving.demo_model.training.data import ANSWER, EASY_SHARDS, FIRST, TOKEN_BITS

#: Shards kept in memory to be read again when the generator is slower than the training.
_KEPT = 1500
#: The first tokens of an answer decide: refusal or not, and which passage.
_LEAD = 6


class Shards:
    """The shards of a stream in order, from `first` on.

    With `replay`, a shard that is not ready in time is replaced by an earlier one, chosen at
    random; otherwise the training waits. `number` is the next new shard, to resume from.
    """

    def __init__(self, folder: Path, first: int, generator: list[str] | None, replay: bool) -> None:
        self._folder = folder
        self.number = first
        self.replayed = 0
        self._replay = replay
        self._random = Random(first)
        self._kept: list[np.ndarray] = []
        self._ready: queue.Queue[Path | None] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        if generator is not None:
            command = [sys.executable, "-m", "serving.demo_model.training.data", *generator]
            self._process = subprocess.Popen(
                [*command, "--first", str(first)], stdout=subprocess.PIPE, text=True
            )
            threading.Thread(target=self._listen, daemon=True).start()
        else:
            for file in sorted(folder.glob("*.npy")):
                if int(file.stem) >= first:
                    self._ready.put(file)
            self._ready.put(None)

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._ready.put(Path(line.strip()))
        self._ready.put(None)

    def next(self) -> np.ndarray:
        """Return the next shard.

        Raises:
            EOFError: there are no more shards and none may be read again.
        """
        try:
            file = self._ready.get(block=not (self._replay and self._kept))
        except queue.Empty:
            self.replayed += 1
            return self._random.choice(self._kept)
        if file is None:
            if not (self._replay and self._kept):
                raise EOFError(f"The shards of {self._folder} are used up; make more of them.")
            self._ready.put(None)
            self.replayed += 1
            return self._random.choice(self._kept)
        shard: np.ndarray = np.load(file)
        self.number = int(file.stem) + 1
        if self.number == EASY_SHARDS + 1:  # what was easy is not read again
            self._kept.clear()
        self._kept.append(shard)
        if len(self._kept) > _KEPT:
            del self._kept[0]
        return shard

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def batches(shards: Shards, rows: int, device: torch.device) -> Iterator[Tensor]:
    """Yield [rows, context] int64 tensors of marked tokens on the device."""
    while True:
        shard = torch.from_numpy(shards.next().astype(np.int32)).to(device, non_blocking=True)
        for start in range(0, len(shard) - rows + 1, rows):
            yield shard[start : start + rows].long()


def unpack(
    marked: Tensor, filler: int, context_weight: float, lead_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (tokens, positions, documents, targets, weights), each [rows, context].

    Positions count from 0 in every document. The weight of a target is 1 in an answer,
    `lead_weight` (at least 1) in its first few tokens, `context_weight` (less than 1) elsewhere,
    and 0 where it belongs to the next document, fills a row or lies behind it.
    """
    tokens = marked & TOKEN_BITS
    starts = (marked & FIRST) != 0
    documents = starts.cumsum(1)
    places = torch.arange(marked.shape[1], device=marked.device).expand_as(marked)
    positions = places - torch.where(starts, places, 0).cummax(1).values
    answer = (marked & ANSWER) != 0
    # A row begins with a document and no document with an answer: what is rolled past an end
    # of the row is of no matter, below too, where the first token becomes the last one's target.
    begun = torch.where(answer & ~answer.roll(1, 1), places, 0).cummax(1).values
    weights = torch.where(answer, 1.0, context_weight)
    weights = weights.masked_fill(answer & (places - begun < _LEAD), lead_weight)
    weights = weights.masked_fill(starts | (tokens == filler), 0.0)
    return tokens, positions, documents, tokens.roll(-1, 1), weights.roll(-1, 1)
