"""Search inside a course: opened indexes, a bounded number of searches at a time."""

import threading
import time
from pathlib import Path

import anyio

from backend.database import Database
from backend.documents import service
from backend.documents.retrieval import IndexUnusable, OpenIndex, Retrieval
from backend.documents.schemas import PassageOut
from backend.errors import ApiError
from monitoring.metrics import BackendMetrics

_PARALLEL_SEARCHES = 2


class CourseSearch:
    """Answers queries from the newest index generation of each course.

    The number of the generation is read from the database before every search, so a new index is
    used as soon as the worker has announced it. Hits are filtered by what is live in the database:
    a deleted document is gone at once, before its vectors are.
    """

    def __init__(
        self, database: Database, retrieval: Retrieval, folder: Path, metrics: BackendMetrics
    ) -> None:
        self._database = database
        self._retrieval = retrieval
        self._folder = folder
        self._metrics = metrics
        self._open: dict[int, tuple[int, OpenIndex]] = {}
        self._opening = threading.Lock()
        self._limiter: anyio.CapacityLimiter | None = None

    async def search(self, course_id: int, query: str, k: int) -> list[PassageOut]:
        """The best `k` passages; raises ApiError 503 while the index cannot be used."""
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_PARALLEL_SEARCHES)
        return await anyio.to_thread.run_sync(
            self._search, course_id, query, k, limiter=self._limiter
        )

    def warm_up(self) -> None:
        self._retrieval.warm_up()

    def _search(self, course_id: int, query: str, k: int) -> list[PassageOut]:
        generation = service.index_generation(self._database, course_id)
        if generation == 0 or not query.strip():
            return []
        began = time.perf_counter()
        try:
            index = self._index(course_id, generation)
            # Some hits may be tombstones: ask for more than are shown.
            hits = index.search(query, 3 * k + 10)
        except IndexUnusable as error:
            raise ApiError(503, "index_unusable", str(error)) from error
        live = service.live_passages(self._database, course_id, [hit.passage_id for hit in hits])
        found = [
            service.passage_out(*live[hit.passage_id], score=hit.score)
            for hit in hits
            if hit.passage_id in live
        ]
        self._metrics.search_seconds.observe(time.perf_counter() - began)
        return found[:k]

    def _index(self, course_id: int, generation: int) -> OpenIndex:
        with self._opening:
            opened = self._open.get(course_id)
            if opened is None or opened[0] != generation:
                index = self._retrieval.open(self._folder / str(course_id))
                opened = self._open[course_id] = (generation, index)
            return opened[1]
