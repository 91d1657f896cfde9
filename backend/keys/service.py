"""Making, listing, revoking and checking API keys."""

import time
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select, update

from backend.accounts.models import User
from backend.database import Database, utcnow
from backend.errors import ApiError, not_found
from backend.keys import secret
from backend.keys.models import STANDARD, ApiKey

_MAX_LIVE_KEYS = 50
_CACHE_SECONDS = 2.0
_TOUCH_SECONDS = 60.0


@dataclass(frozen=True)
class KeyOwner:
    key_id: int
    user_id: int
    service_class: str


def create(
    database: Database,
    user_id: int,
    name: str,
    expires_in_days: int | None,
    service_class: str = STANDARD,
) -> tuple[ApiKey, str]:
    """Make a key and return it with its clear text, which exists nowhere afterwards."""
    made = secret.make()
    now = utcnow()
    key = ApiKey(
        user_id=user_id,
        name=name,
        key_hash=made.hash,
        prefix=made.prefix,
        last4=made.last4,
        created_at=now,
        expires_at=now + timedelta(days=expires_in_days) if expires_in_days else None,
        service_class=service_class,
    )
    with database.write() as session:
        live = session.execute(
            select(func.count())
            .select_from(ApiKey)
            .where(ApiKey.user_id == user_id, ApiKey.revoked_at.is_(None))
        ).scalar_one()
        if live >= _MAX_LIVE_KEYS:
            raise ApiError(
                409, "too_many_keys", f"You have {live} keys. Revoke one before making another."
            )
        session.add(key)
    return key, made.key


def list_keys(database: Database, user_id: int) -> list[ApiKey]:
    with database.read() as session:
        return list(
            session.execute(
                select(ApiKey).where(ApiKey.user_id == user_id).order_by(ApiKey.id.desc())
            ).scalars()
        )


def revoke(database: Database, user_id: int, key_id: int) -> None:
    with database.write() as session:
        key = session.get(ApiKey, key_id)
        if key is None or key.user_id != user_id:
            raise not_found("key")
        if key.revoked_at is None:
            key.revoked_at = utcnow()


def set_class(
    database: Database, key_id: int, service_class: str, owner: int | None = None
) -> ApiKey:
    """Change the class of a key; with `owner`, only of a key of that user."""
    with database.write() as session:
        key = session.get(ApiKey, key_id)
        if key is None or owner not in (None, key.user_id):
            raise not_found("key")
        key.service_class = service_class
    return key


class KeyCheck:
    """Finds the owner of a key. Right answers are kept for two seconds, wrong ones never."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._cache: dict[str, tuple[float, KeyOwner]] = {}
        self._touched: dict[int, float] = {}

    async def owner(self, key: str) -> KeyOwner | None:
        if not secret.is_well_formed(key):
            return None
        hashed = secret.digest(key)
        now = time.monotonic()
        cached = self._cache.get(hashed)
        if cached is not None and cached[0] > now:
            return cached[1]
        owner = await self._database.run(self._look_up, hashed, now)
        if owner is None:
            self._cache.pop(hashed, None)
            return None
        if len(self._cache) > 4096:
            self._cache = {k: v for k, v in self._cache.items() if v[0] > now}
        self._cache[hashed] = (now + _CACHE_SECONDS, owner)
        return owner

    def forget(self) -> None:
        self._cache.clear()

    def _look_up(self, hashed: str, now: float) -> KeyOwner | None:
        moment = utcnow()
        with self._database.read() as session:
            row = session.execute(
                select(ApiKey.id, ApiKey.user_id, ApiKey.service_class)
                .join(User, User.id == ApiKey.user_id)
                .where(
                    ApiKey.key_hash == hashed,
                    ApiKey.revoked_at.is_(None),
                    (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > moment),
                    User.active.is_(True),
                )
            ).one_or_none()
        if row is None:
            return None
        if now - self._touched.get(row.id, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[row.id] = now
            with self._database.write() as session:
                session.execute(
                    update(ApiKey).where(ApiKey.id == row.id).values(last_used_at=moment)
                )
        return KeyOwner(row.id, row.user_id, row.service_class)
