"""Back-off after failed logins, per account name and address, alone and together.

Whoever guesses at an account from one address soon waits long there. The account as a whole waits
briefly and only after more failures, so that nobody can lock another person out for long.

An attempt is counted as failed before the password is checked and forgiven when it was right, so
that many attempts at the same moment cannot all slip in before the first failure is written.
Unknown names are counted like known ones. Subjects are stored as hashes.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from backend.accounts.models import LoginFailure
from backend.database import Database, utcnow
from backend.errors import ApiError

_FORGET_AFTER = timedelta(hours=1)


@dataclass(frozen=True)
class _Rule:
    free: int  # failures before the first wait
    longest: int  # seconds


_PAIR = _Rule(free=5, longest=900)
_ACCOUNT = _Rule(free=25, longest=30)
_ADDRESS = _Rule(free=50, longest=60)


def wait_seconds(failures: int, rule: _Rule = _PAIR) -> int:
    """Seconds to wait after this many failures: 0, then 1, 2, 4, ... up to the rule's longest."""
    over = failures - rule.free
    if over <= 0:
        return 0
    return rule.longest if over > 16 else min(rule.longest, int(2 ** (over - 1)))


def _hash(value: str) -> str:
    return hashlib.sha256(value.casefold().encode()).hexdigest()[:32]


def _subject(kind: str, *values: str) -> str:
    return ":".join((kind, *map(_hash, values)))


def begin_attempt(database: Database, username: str, address: str) -> None:
    """Count an attempt; raises ApiError 429 with Retry-After while the account or address waits."""
    now = utcnow()
    with database.write() as session:
        for subject, rule in (
            (_subject("pair", username, address), _PAIR),
            (_subject("account", username), _ACCOUNT),
            (_subject("address", address), _ADDRESS),
        ):
            _count(session, database.is_sqlite, subject, rule, now)
        session.execute(delete(LoginFailure).where(LoginFailure.last_at < now - _FORGET_AFTER))


def _count(session: Session, is_sqlite: bool, subject: str, rule: _Rule, now: datetime) -> None:
    insert = sqlite_insert if is_sqlite else postgres_insert
    session.execute(
        insert(LoginFailure)
        .values(subject=subject, failures=0, last_at=now)
        .on_conflict_do_nothing(index_elements=["subject"])
    )
    row = session.execute(
        select(LoginFailure).where(LoginFailure.subject == subject).with_for_update()
    ).scalar_one()
    if row.blocked_until is not None and row.blocked_until > now:
        wait = max(1, int((row.blocked_until - now).total_seconds() + 0.999))
        raise ApiError(
            429,
            "too_many_logins",
            f"There were too many failed logins. Try again in {wait} seconds.",
            headers={"Retry-After": str(wait)},
        )
    row.failures = row.failures + 1 if now - row.last_at < _FORGET_AFTER else 1
    row.last_at = now
    wait = wait_seconds(row.failures, rule)
    row.blocked_until = now + timedelta(seconds=wait) if wait else None


def forgive(session: Session, username: str, address: str) -> None:
    """The password was right: the account starts fresh here, the address gets this attempt back.

    Failures of other addresses stay counted there.
    """
    subjects = (_subject("account", username), _subject("pair", username, address))
    session.execute(delete(LoginFailure).where(LoginFailure.subject.in_(subjects)))
    session.execute(
        update(LoginFailure)
        .where(LoginFailure.subject == _subject("address", address), LoginFailure.failures > 0)
        .values(failures=LoginFailure.failures - 1, blocked_until=None)
    )


def forgive_account(session: Session, username: str) -> None:
    """An administrator gave a new password: whatever failed before counts no longer."""
    pairs = LoginFailure.subject.startswith(_subject("pair", username))
    session.execute(
        delete(LoginFailure).where(pairs | (LoginFailure.subject == _subject("account", username)))
    )
