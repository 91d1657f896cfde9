"""Layers that come to a stage or leave it while it works: their KV is copied in the background.

A move begins between two plans, and the first plan of the new epoch ends it. In between the old
owner of a layer goes on computing it, and sends what its KV holds to the new one: first all pages
in use, then what each micro-batch has written, in order. Both know what that is from the plans, so
nothing but KV is sent. What is sent may be newer than the micro-batch it is sent for; then it is
sent again for the one that wrote it.

From the switch on the new owner computes. It may come to the switch before the old owner has
finished the micro-batches planned before it (a stage nearer to the first one always does), so it
waits for what it is going to read or to overwrite, and for nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from serving.core import Layout
from serving.errors import EngineDeadError
from serving.messages import MoveLayers
from serving.stage.copies import KvCopies, Pages, Place, Tokens
from serving.stage.mirror import Rows


@dataclass(frozen=True)
class Route:
    """KV of a layer goes to, or comes from, another stage."""

    layer: int
    peer: int


@dataclass(frozen=True)
class _Held:
    """All pages in use."""

    epoch: int
    place: Pages


@dataclass(frozen=True)
class _Written:
    """What a micro-batch wrote."""

    number: int
    place: Tokens


@dataclass(frozen=True)
class _Switched:
    """The old owner has not written anything after what came before."""

    epoch: int


_What = _Held | _Written | _Switched


class _Lane:
    """Copies in one direction, on a thread, in the order in which they were asked for, and of each
    the routes by layer. As that order is the same on all stages, none wait for each other in a
    circle.
    """

    def __init__(
        self,
        name: str,
        copy: Callable[[Route, Place, object], None],
        done: Callable[[_What], None],
        failed: Callable[[str], None],
    ) -> None:
        self._copy, self._done, self._failed = copy, done, failed
        self._tasks: SimpleQueue[tuple[list[tuple[Route, object]], _What]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, routes: list[tuple[Route, object]], what: _What) -> None:
        """Each route with what `copy` gets for it."""
        self._tasks.put((routes, what))

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while True:
                    routes, what = self._tasks.get()
                    if not isinstance(what, _Switched):
                        for route, begun in routes:
                            self._copy(route, what.place, begun)
                    self._done(what)
        except Exception as error:
            self._failed(str(error) or type(error).__name__)


class LayerMoves:
    """One rank's part in moves. `tell` is called with epoch and `settled` of `LayersCopied`,
    `failed` with the reason, both from other threads.
    """

    def __init__(
        self,
        stage: int,
        layout: Layout,
        copies: KvCopies,
        *,
        tell: Callable[[int, bool], None],
        failed: Callable[[str], None],
    ) -> None:
        self.layout = layout
        self._stage, self._copies = stage, copies
        self._tell, self._say_failed = tell, failed
        self._coming: Layout | None = None
        self._outgoing: list[Route] = []
        self._incoming: list[Route] = []
        #: By page, the last micro-batch of the old owner that wrote it, or -1.
        self._written: NDArray[np.int64] = np.full(copies.num_pages, -1, dtype=np.int64)
        self._last_written = -1
        self._news = threading.Condition()
        self._arrived = -1
        self._broken = ""
        self._out = _Lane("layers out", self._send, lambda what: None, self._fail)
        self._in = _Lane("layers in", self._receive, self._has_come, self._fail)

    # ---- on the stage's own thread

    def begin(self, move: MoveLayers) -> None:
        """Start copying. All micro-batches planned so far have been begun here."""
        if self._coming is not None:  # no micro-batch was planned since that move began
            self._switch(self._coming)
        old, new = self.layout, move.layout
        self._coming = new
        mine, next_mine = old.layers(self._stage), new.layers(self._stage)
        self._outgoing = [Route(one, new.owner(one)) for one in mine if one not in next_mine]
        self._incoming = [Route(one, old.owner(one)) for one in next_mine if one not in mine]
        held = np.frombuffer(move.pages, dtype="<u4").astype(np.int64)
        pages = _Held(new.epoch, Pages(torch.from_numpy(held)))
        self._give(pages)
        if self._incoming:
            self._written.fill(-1)
            self._take(pages)

    def before(self, epoch: int, rows: Rows) -> None:
        """Call before a micro-batch is computed. From here on `layout` is the one of its epoch.

        Waits for KV that the micro-batch needs and that is still on its way.
        """
        if epoch != self.layout.epoch:
            if self._coming is None or self._coming.epoch != epoch:
                raise EngineDeadError(f"A plan is of layout {epoch}, which nobody announced.")
            self._switch(self._coming)
        elif self._coming is not None and self._incoming:
            self._take(self._writes(rows))
            self._last_written = rows.number
            self._written[rows.slot_mapping // self._copies.page_size] = rows.number
        if self._coming is None and self._arrived < self._last_written:
            self._wait_for(int(self._written[rows.page_tables].max()))

    def after(self, rows: Rows) -> None:
        """Call when a micro-batch has been computed, or all of its work been launched."""
        if self._coming is not None and self._outgoing:
            self._give(self._writes(rows))

    def _give(self, what: _Held | _Written) -> None:
        routes = self._outgoing
        begun = [self._copies.begin(one.layer, what.place, one.peer) for one in routes]
        if routes:
            self._out.put(list(zip(routes, begun, strict=True)), what)

    def _take(self, what: _What) -> None:
        self._in.put([(route, None) for route in self._incoming], what)

    def _switch(self, layout: Layout) -> None:
        self.layout, self._coming = layout, None
        if self._incoming:
            self._take(_Switched(layout.epoch))

    def _writes(self, rows: Rows) -> _Written:
        pages, offsets = np.divmod(rows.slot_mapping, self._copies.page_size)
        place = Tokens(torch.from_numpy(pages), torch.from_numpy(offsets))
        return _Written(rows.number, place)

    def _wait_for(self, number: int) -> None:
        with self._news:
            self._news.wait_for(lambda: self._broken or self._arrived >= number)
        if self._broken:
            raise EngineDeadError(self._broken)

    # ---- on the lanes' threads

    def _send(self, route: Route, place: Place, begun: object) -> None:
        self._copies.end(route.layer, place, route.peer, begun)

    def _receive(self, route: Route, place: Place, begun: object) -> None:
        self._copies.receive(route.layer, place, route.peer)

    def _has_come(self, what: _What) -> None:
        if isinstance(what, _Written):
            with self._news:
                self._arrived = what.number
                self._news.notify_all()
        elif isinstance(what, _Switched):
            self._tell(what.epoch, True)
        else:
            self._tell(what.epoch, False)

    def _fail(self, reason: str) -> None:
        with self._news:
            self._broken = reason
            self._news.notify_all()
        self._say_failed(reason)
