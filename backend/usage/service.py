"""Reserve, then settle: the one way a budget changes, for page and gateway alike.

A call first sets aside the most it can cost by one guarded UPDATE, which is the same on SQLite and
PostgreSQL; the database decides, so calls at the same moment cannot overspend together. When the
call ends its real cost replaces the reservation. A reservation is settled at most once: its row is
deleted in the same transaction.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from backend.database import Database, utcnow
from backend.errors import ApiError
from backend.usage.models import Reservation, TokenBudget, UsageRecord
from backend.usage.schemas import Day, Totals, UsageOut


@dataclass(frozen=True)
class Caller:
    """Who a call is charged to."""

    user_id: int
    source: str  # "page" or "gateway"
    key_id: int | None = None
    course_id: int | None = None


@dataclass(frozen=True)
class Reserved:
    id: int
    remaining: int  # tokens still free today after this reservation


@dataclass(frozen=True)
class Cost:
    """What a call has really used. `status`: complete, cancelled or failed."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    status: str
    estimated: bool = False


def seconds_to_midnight(now: datetime | None = None) -> int:
    now = now or utcnow()
    tomorrow = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return max(1, int((tomorrow - now).total_seconds()))


def over_budget() -> ApiError:
    return ApiError(
        429,
        "insufficient_quota",
        "Your token budget for today is used up or too small for this request. It starts anew at "
        "midnight UTC.",
        headers={"Retry-After": str(seconds_to_midnight()), "x-should-retry": "false"},
    )


def reserve(database: Database, caller: Caller, tokens: int, daily: int) -> Reserved:
    """Set `tokens` aside for today; raises ApiError 429 insufficient_quota if they are not free."""
    today = utcnow().date()
    insert = sqlite_insert if database.is_sqlite else postgres_insert
    mine = (TokenBudget.user_id == caller.user_id, TokenBudget.day == today)
    with database.write() as session:
        session.execute(
            insert(TokenBudget)
            .values(user_id=caller.user_id, day=today, used=0, reserved=0)
            .on_conflict_do_nothing(index_elements=["user_id", "day"])
        )
        row = session.execute(
            update(TokenBudget)
            .where(*mine, TokenBudget.used + TokenBudget.reserved + tokens <= daily)
            .values(reserved=TokenBudget.reserved + tokens)
            .returning(TokenBudget.used, TokenBudget.reserved)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        if row is None:
            raise over_budget()
        reservation = Reservation(user_id=caller.user_id, day=today, tokens=tokens)
        session.add(reservation)
        session.flush()
        return Reserved(reservation.id, daily - row.used - row.reserved)


def settle(database: Database, reserved: Reserved, caller: Caller, cost: Cost) -> None:
    """Replace the reservation by the real cost and write the record. Twice is once."""
    with database.write() as session:
        gone = session.execute(
            delete(Reservation)
            .where(Reservation.id == reserved.id)
            .returning(Reservation.day, Reservation.tokens)
        ).one_or_none()
        if gone is None:
            return
        session.execute(
            update(TokenBudget)
            .where(TokenBudget.user_id == caller.user_id, TokenBudget.day == gone.day)
            .values(
                reserved=TokenBudget.reserved - gone.tokens,
                used=TokenBudget.used + cost.prompt_tokens + cost.completion_tokens,
            )
            .execution_options(synchronize_session=False)
        )
        session.add(
            UsageRecord(
                user_id=caller.user_id,
                key_id=caller.key_id,
                course_id=caller.course_id,
                day=gone.day,
                source=caller.source,
                model=cost.model[:200],
                prompt_tokens=cost.prompt_tokens,
                completion_tokens=cost.completion_tokens,
                estimated=cost.estimated,
                status=cost.status,
            )
        )


def release(database: Database, reserved: Reserved, caller: Caller) -> None:
    """The call cost nothing (it was refused upstream): give the reservation back, no record."""
    with database.write() as session:
        gone = session.execute(
            delete(Reservation)
            .where(Reservation.id == reserved.id)
            .returning(Reservation.day, Reservation.tokens)
        ).one_or_none()
        if gone is not None:
            session.execute(
                update(TokenBudget)
                .where(TokenBudget.user_id == caller.user_id, TokenBudget.day == gone.day)
                .values(reserved=TokenBudget.reserved - gone.tokens)
                .execution_options(synchronize_session=False)
            )


def release_all(database: Database) -> None:
    """At start no call is running: what a killed backend had set aside is free again."""
    with database.write() as session:
        session.execute(delete(Reservation))
        session.execute(update(TokenBudget).where(TokenBudget.reserved != 0).values(reserved=0))


def has_budget(database: Database, user_id: int, daily: int) -> bool:
    with database.read() as session:
        row = session.get(TokenBudget, (user_id, utcnow().date()))
    return row is None or row.used + row.reserved < daily


def report(database: Database, user_id: int, days: int, daily: int) -> UsageOut:
    """Tokens and requests of the last `days` UTC days, newest last, without idle days."""
    today = utcnow().date()
    since: date = today - timedelta(days=days - 1)
    with database.read() as session:
        rows = session.execute(
            select(
                UsageRecord.day,
                func.sum(UsageRecord.prompt_tokens),
                func.sum(UsageRecord.completion_tokens),
                func.count(),
            )
            .where(UsageRecord.user_id == user_id, UsageRecord.day >= since)
            .group_by(UsageRecord.day)
            .order_by(UsageRecord.day)
        ).all()
        budget = session.get(TokenBudget, (user_id, today))
    out = [
        Day(date=day, prompt_tokens=int(prompt), completion_tokens=int(completion), requests=count)
        for day, prompt, completion, count in rows
    ]
    total = Totals(
        prompt_tokens=sum(day.prompt_tokens for day in out),
        completion_tokens=sum(day.completion_tokens for day in out),
        requests=sum(day.requests for day in out),
    )
    return UsageOut(
        days=out,
        total=total,
        budget_tokens=daily,
        budget_used_today=budget.used if budget else 0,
    )
