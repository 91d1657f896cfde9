"""New stages in the place of dead ones: how often.

What becomes of the requests is decided in `Scheduler.begin` (`serving/driver/scheduler.py`).
"""

from __future__ import annotations

import time
from collections import deque

from serving.config.engine import EngineConfig
from serving.core import MicroBatch
from serving.errors import ConfigError, EngineDeadError

#: A GPU's free memory is never quite the same twice; what is spared there is far more than this.
_PAGES_SLACK = 0.02


class Deaths:
    """Of an engine's stages. More than `most` within `within` seconds are too many: whatever kills
    them then, perhaps a request that is unfinished itself, would kill the next ones too.
    """

    most = 3
    within = 600.0

    def __init__(self) -> None:
        self.restarts = 0
        self._times: deque[float] = deque()

    def note(self, cause: str, now: float) -> None:
        """One more at time `now`. Raises EngineDeadError if the stages shall not start again."""
        self._times.append(now)
        while now - self._times[0] > self.within:
            self._times.popleft()
        if len(self._times) > self.most:
            raise EngineDeadError(
                f"The stages ended {len(self._times)} times within {self.within / 60:.0f} minutes "
                f"and are not started again. The last time: {cause}"
            )
        self.restarts += 1


def check_pages(config: EngineConfig, fitting: int, num_pages: int) -> None:
    """Raise ConfigError unless new stages can hold the pages that there were."""
    if config.num_kv_pages is None and fitting < (1 - _PAGES_SLACK) * num_pages:
        raise ConfigError(
            f"The stages were started again, but hold only {fitting} KV pages instead of "
            f"{num_pages}; free the memory that something else has taken, or ask for fewer pages "
            "with --num-kv-pages.",
            "--num-kv-pages",
        )


def check_progress(flight: deque[MicroBatch], step_timeout: float) -> None:
    """Raise EngineDeadError if a micro-batch does not come back: then a stage hangs."""
    if not flight:
        return
    waited = time.monotonic() - flight[0].sent_at
    if waited > step_timeout:
        raise EngineDeadError(
            f"A micro-batch has not come back for {waited:.0f} s, so a stage hangs; raise "
            "--step-timeout if steps may really take that long."
        )
