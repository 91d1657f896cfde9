"""One metered call of the model, for asynchronous callers."""

import asyncio
from collections.abc import Callable
from typing import Any

from backend.database import Database
from backend.errors import ApiError
from backend.usage import service
from backend.usage.service import Caller, Cost, Reserved
from monitoring.metrics import BackendMetrics


class Ledger:
    """Opens meters and makes sure that each is settled, whatever happens to the caller."""

    def __init__(self, database: Database, metrics: BackendMetrics, daily_tokens: int) -> None:
        self._database = database
        self._metrics = metrics
        self.daily_tokens = daily_tokens
        self._pending: set[asyncio.Task[None]] = set()

    async def open(self, caller: Caller, tokens: int) -> "Meter":
        """Reserve `tokens`; raises ApiError 429 insufficient_quota."""
        try:
            reserved = await self._database.run(
                service.reserve, self._database, caller, tokens, self.daily_tokens
            )
        except ApiError:
            self._metrics.quota_refusals.inc()
            raise
        return Meter(self, caller, reserved)

    async def settle(self, meter: "Meter", cost: Cost) -> None:
        self._metrics.gateway_tokens.labels(kind="prompt").inc(cost.prompt_tokens)
        self._metrics.gateway_tokens.labels(kind="completion").inc(cost.completion_tokens)
        await self._surely(service.settle, meter.reserved, meter.caller, cost)

    async def release(self, meter: "Meter") -> None:
        await self._surely(service.release, meter.reserved, meter.caller)

    async def _surely(self, work: Callable[..., None], *args: Any) -> None:
        # A task of its own: the caller may be cancelled at any moment, the ledger may not.
        task = asyncio.ensure_future(self._database.run(work, self._database, *args))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        if self._pending:
            await asyncio.gather(*self._pending, return_exceptions=True)


class Meter:
    """A reservation that becomes a cost (`settle`) or nothing (`release`); the first one counts."""

    def __init__(self, ledger: Ledger, caller: Caller, reserved: Reserved) -> None:
        self._ledger = ledger
        self._closed = False
        self.caller = caller
        self.reserved = reserved

    async def settle(self, cost: Cost) -> None:
        if not self._closed:
            self._closed = True
            await self._ledger.settle(self, cost)

    async def release(self) -> None:
        if not self._closed:
            self._closed = True
            await self._ledger.release(self)
