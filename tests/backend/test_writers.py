"""50 writers for 30 seconds: no error, nothing lost. Costs 30 s by intention, on SQLite."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select

from backend import schema
from backend.accounts.models import User
from backend.courses.models import Course
from backend.database import Database, utcnow
from backend.documents.models import Document, Passage
from backend.usage import service as usage
from backend.usage.models import TokenBudget, UsageRecord
from backend.usage.service import Caller, Cost

SECONDS = 30.0
PROCESSES, THREADS = 5, 10  # 50 writers, as threads of one backend and as other processes

WRITER = """
import sys
from tests.backend.test_writers import write_for
print(write_for(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
"""


def write_for(url: str, number: int, seconds: float) -> int:
    """Ten threads of one process; returns how many calls were settled. Raises the first error."""
    assert "api_keys" in schema.metadata.tables  # every table is known to this process
    database = Database(url)
    counts, errors = [0] * THREADS, []
    end = time.monotonic() + seconds

    def write(thread: int) -> None:
        caller = Caller(user_id=1 + (number * THREADS + thread) % 20, source="gateway")
        try:
            while time.monotonic() < end:
                reserved = usage.reserve(database, caller, 100, 10**12)
                if thread == 0:  # the worker's bulk writes, in slices
                    with database.write() as session:
                        session.add_all(
                            Passage(document_id=1, text="x" * 1000, heading_path=[], start=0, end=1)
                            for _ in range(100)
                        )
                usage.settle(database, reserved, caller, Cost("demo", 3, 4, "complete"))
                counts[thread] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    if errors:
        raise errors[0]
    return sum(counts)


@pytest.mark.timeout(120)
def test_50_writers_for_30_seconds(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.write() as session:
        session.add_all(
            User(username=f"u{n}", display_name="U", role="student", password_hash="-")
            for n in range(20)
        )
        session.add(Course(slug="c", name="C"))
        session.flush()
        session.add(Document(course_id=1, name="d", sha256="0", bytes=1))
    root = str(Path(__file__).parents[2])
    began = utcnow()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, sqlite_url, str(number), str(SECONDS)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]
    settled = 0
    for writer in writers:
        out, err = writer.communicate(timeout=100)
        assert writer.returncode == 0, err.decode()[-2000:]
        settled += int(out)
    assert (utcnow() - began).total_seconds() >= SECONDS
    with database.read() as session:
        assert (
            session.execute(select(func.count()).select_from(UsageRecord)).scalar_one() == settled
        )
        used, reserved = session.execute(
            select(func.sum(TokenBudget.used), func.sum(TokenBudget.reserved))
        ).one()
    assert settled >= 50
    assert (used, reserved) == (7 * settled, 0)
    database.close()
