"""Layers that move between stages while serving, as the driver sees it.

    idle -> copying -> settling -> idle

A move is announced to all stages between two plans. Each rank that gets layers says when it has
all pages that were in use; when all have, the next plan is of the new epoch, and that is the
switch: plans pass every stage in one order, so no stage ever runs a micro-batch with another layout
than its neighbours. What was written in the meantime may still be on its way for a moment; until it
has come no other move begins.

`layout` is the one that plans follow. Whatever dies in the middle of a move, a new group starts
with it: the old one until the switch, the new one from then on.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from serving.core import Layout
from serving.messages import LayersCopied, MoveLayers


class Migration:
    """`movable` as in `Layout.windows`: no bound goes further from `home`."""

    def __init__(self, home: Layout, movable: int, ranks: int) -> None:
        self.layout = home
        self.windows = home.windows(movable)
        self._ranks = ranks
        self._target: Layout | None = None
        self._epoch = home.epoch  # of the move that is or was made last
        self._first = 0
        #: When the last move began.
        self.decided = 0.0
        self._copying: set[tuple[int, int]] = set()
        self._settling: set[tuple[int, int]] = set()

    @property
    def idle(self) -> bool:
        return self._target is None and not self._settling

    def allows(self, layout: Layout) -> bool:
        """Whether stages hold what this layout asks of them."""
        return len(layout.bounds) == len(self.windows) and all(
            bound in window for bound, window in zip(layout.bounds, self.windows, strict=True)
        )

    def begin(self, layout: Layout, held: Iterable[int], first: int, now: float) -> MoveLayers:
        """Start a move to other bounds; `held` are the pages that hold anything, `first` is the
        number of the next plan. Only when idle."""
        if not self.idle or not self.allows(layout) or layout.bounds == self.layout.bounds:
            raise AssertionError(f"layers cannot move to {layout.bounds} now")
        self._epoch = self.layout.epoch + 1
        self._target = Layout(self._epoch, layout.bounds)
        self.decided = now
        getting = {
            (stage, rank)
            for stage in range(layout.num_stages)
            if any(layer not in self.layout.layers(stage) for layer in layout.layers(stage))
            for rank in range(self._ranks)
        }
        self._copying, self._settling = set(getting), getting
        self._first = first
        return MoveLayers(self._target, np.fromiter(held, dtype="<u4").tobytes())

    def copied(self, message: LayersCopied) -> None:
        """News of a rank that gets layers."""
        if message.epoch != self._epoch:
            return  # it settled before: nothing was planned in that move
        who = (message.stage, message.rank)
        (self._settling if message.settled else self._copying).discard(who)

    def switch(self, first: int) -> Layout | None:
        """The new layout, once, as soon as it may be: the next plan, which is number `first`, must
        be of its epoch."""
        if self._target is None or self._copying:
            return None
        self.layout, self._target = self._target, None
        if first == self._first:  # nothing was written in the meantime
            self._settling.clear()
        return self.layout

    def forget(self) -> None:
        """The stages are gone, and with them whatever was being copied."""
        self._target = None
        self._copying, self._settling = set(), set()
