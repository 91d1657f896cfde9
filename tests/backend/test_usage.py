"""Budgets: reserve, then settle, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.accounts.models import User
from backend.database import Database, utcnow
from backend.errors import ApiError
from backend.usage import service
from backend.usage.models import Reservation, TokenBudget, UsageRecord
from backend.usage.service import Caller, Cost
from tests.backend.world import World


@pytest.fixture
def caller(database: Database) -> Caller:
    user = User(username="u", display_name="U", role="student", password_hash="-")
    with database.write() as session:
        session.add(user)
    return Caller(user.id, "gateway")


def budget(database: Database, caller: Caller) -> tuple[int, int]:
    with database.read() as session:
        row = session.get(TokenBudget, (caller.user_id, utcnow().date()))
    assert row is not None
    return row.used, row.reserved


def test_settle_replaces_the_reservation(database: Database, caller: Caller) -> None:
    reserved = service.reserve(database, caller, 100, daily=1000)
    assert reserved.remaining == 900
    assert budget(database, caller) == (0, 100)
    cost = Cost("demo", 10, 20, "complete")
    service.settle(database, reserved, caller, cost)
    service.settle(database, reserved, caller, cost)  # twice is once
    service.release(database, reserved, caller)
    assert budget(database, caller) == (30, 0)
    report = service.report(database, caller.user_id, 30, 1000)
    assert (report.total.prompt_tokens, report.total.completion_tokens) == (10, 20)
    assert report.total.requests == 1
    assert report.budget_used_today == 30


def test_release_leaves_no_trace(database: Database, caller: Caller) -> None:
    reserved = service.reserve(database, caller, 100, daily=1000)
    service.release(database, reserved, caller)
    assert budget(database, caller) == (0, 0)
    with database.read() as session:
        assert session.query(UsageRecord).count() == 0


def test_too_much_is_refused_and_not_retried(database: Database, caller: Caller) -> None:
    with pytest.raises(ApiError) as refused:
        service.reserve(database, caller, 1001, daily=1000)
    assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
    assert refused.value.headers["x-should-retry"] == "false"
    assert 0 < int(refused.value.headers["Retry-After"]) <= 86_400


def test_200_reservations_at_once_never_overspend(database: Database, caller: Caller) -> None:
    def reserve(_: int) -> bool:
        try:
            service.reserve(database, caller, 10, daily=505)
        except ApiError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        through = sum(pool.map(reserve, range(200)))
    assert through == 50
    assert budget(database, caller) == (0, 500)


def test_a_killed_backend_gives_back_what_it_had_reserved(
    database: Database, caller: Caller
) -> None:
    service.reserve(database, caller, 400, daily=1000)
    service.release_all(database)
    assert budget(database, caller) == (0, 0)
    with database.read() as session:
        assert session.query(Reservation).count() == 0
    assert service.has_budget(database, caller.user_id, 1000)


@given(st.datetimes())
def test_the_budget_starts_anew_within_a_day(moment: object) -> None:
    from datetime import UTC, datetime

    assert isinstance(moment, datetime)
    if moment.year < 9999:
        assert 1 <= service.seconds_to_midnight(moment.replace(tzinfo=UTC)) <= 86_400


def test_days_without_use_are_left_out(world: World) -> None:
    assert world.client("student").get("/api/usage").json() == {
        "days": [],
        "total": {"prompt_tokens": 0, "completion_tokens": 0, "requests": 0},
        "budget_tokens": 2_000_000,
        "budget_used_today": 0,
    }
    assert world.client("student").get("/api/usage", params={"days": 0}).status_code == 400
