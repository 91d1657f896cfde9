"""What a running engine tells of its micro-batches, collected for a timeline."""

from __future__ import annotations

import asyncio

from serving.bench.timeline import Batch
from serving.errors import EngineDeadError
from serving.messages import StageSteps, StepPlanned, StepTime

#: Stages report twice a second.
_PATIENCE_S = 10.0


class Recording:
    """Give `take` to `Engine.on_steps`. Stages of one host have one clock, which is time.monotonic
    here, too.
    """

    def __init__(self, stages: int) -> None:
        self._planned: list[StepPlanned] = []
        self._steps: list[dict[int, StepTime]] = [{} for _ in range(stages)]
        self._news = asyncio.Event()

    def take(self, message: StepPlanned | StageSteps) -> None:
        if isinstance(message, StepPlanned):
            self._planned.append(message)
        else:
            self._steps[message.stage].update((step.number, step) for step in message.steps)
            self._news.set()

    def forget(self) -> None:
        """The stages are other ones, and numbers come again."""
        self._planned.clear()
        for steps in self._steps:
            steps.clear()

    async def batches(self, since: float) -> list[Batch]:
        """The micro-batches that began after `since`, once every stage has reported all planned
        ones. Raises EngineDeadError if that does not come.
        """
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while self._planned and not self._reported(self._planned[-1].number):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise EngineDeadError(
                f"The stages have not told within {_PATIENCE_S:.0f} s when they worked, so there "
                "is no timeline."
            ) from None
        found = []
        for batch in self._planned:
            if not self._reported(batch.number):
                continue
            steps = [stage[batch.number] for stage in self._steps]
            if steps[0].began >= since:
                work = [(step.began - since, step.ended - since) for step in steps]
                found.append(
                    Batch(batch.number, batch.decodes, batch.prompt_tokens, batch.epoch, work)
                )
        return found

    def _reported(self, number: int) -> bool:
        return all(number in stage for stage in self._steps)
