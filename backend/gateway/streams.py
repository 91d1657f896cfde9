"""Answers that are running now, so that they can be ended when an account or a key ends."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy import select

from backend.accounts.models import User
from backend.database import Database
from backend.keys.models import ApiKey

log = structlog.get_logger("backend.streams")
WATCH_SECONDS = 1.5


class LiveStreams:
    """Every running call with its user, its key, and how to end it.

    Changes made in this process end streams at once; changes made by another process (the
    `lectern user disable` command) are seen by `watch` within two seconds.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._next = 0
        self._live: dict[int, tuple[int, int | None, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def running(self, user_id: int, key_id: int | None, stop: Callable[[], None]) -> Iterator[None]:
        self._next += 1
        number = self._next
        self._live[number] = (user_id, key_id, stop)
        try:
            yield
        finally:
            del self._live[number]

    def stop_user(self, user_id: int) -> None:
        for user, _, stop in list(self._live.values()):
            if user == user_id:
                stop()

    def stop_key(self, key_id: int) -> None:
        for _, key, stop in list(self._live.values()):
            if key == key_id:
                stop()

    async def watch(self) -> None:
        """Runs for the life of the backend."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            users = {user for user, _, _ in self._live.values()}
            keys = {key for _, key, _ in self._live.values() if key is not None}
            if not users:
                continue
            try:
                gone_users, gone_keys = await self._database.run(self._gone, users, keys)
            except Exception:
                log.exception("the state of accounts could not be read")
                continue
            for user in gone_users:
                self.stop_user(user)
            for key in gone_keys:
                self.stop_key(key)

    def _gone(self, users: set[int], keys: set[int]) -> tuple[set[int], set[int]]:
        with self._database.read() as session:
            active = set(
                session.execute(
                    select(User.id).where(User.id.in_(users), User.active.is_(True))
                ).scalars()
            )
            valid = set(
                session.execute(
                    select(ApiKey.id).where(ApiKey.id.in_(keys), ApiKey.revoked_at.is_(None))
                ).scalars()
            )
        return users - active, keys - valid
