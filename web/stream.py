"""Following a running answer without holding up the script.

A Streamlit script gives way (to a click, a stop, a closed tab) only when it calls Streamlit. The
events are therefore read by a thread, and the script waits for them in short steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType

from web.client import ApiError
from web.sse import Event

_END = object()


class AnswerReader:
    """Reads a stream of events in a thread; use as a context manager.

    Leaving the context lets go of the stream: the thread closes it at the next event or ping. The
    answer itself goes on in the backend.
    """

    def __init__(self, stream: AbstractContextManager[Iterator[Event]]) -> None:
        self._stream = stream
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._read, name="answer-reader", daemon=True)

    def __enter__(self) -> AnswerReader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()

    def _read(self) -> None:
        try:
            with self._stream as events:
                for event in events:
                    if self._left.is_set():
                        return
                    self._queue.put(event)
        except (ApiError, ValueError) as error:
            self._queue.put(error)
        finally:
            self._queue.put(_END)

    def batches(self, wait: float) -> Iterator[list[Event]]:
        """Yield the events that have come, an empty list after `wait` seconds without any.

        Ends with the stream. Raises what the stream raised: ApiError, ValueError.
        """
        while True:
            batch: list[Event] = []
            try:
                item = self._queue.get(timeout=wait)
                while True:
                    if item is _END:
                        if batch:
                            yield batch
                        return
                    if isinstance(item, Exception):
                        if batch:
                            yield batch
                        raise item
                    assert isinstance(item, Event)
                    batch.append(item)
                    item = self._queue.get_nowait()
            except queue.Empty:
                yield batch
