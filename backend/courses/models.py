"""Tables of courses and enrolment."""

import secrets
from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from backend.database import Base, UtcDateTime, utcnow


def new_salt() -> str:
    return secrets.token_hex(16)


class Course(Base):
    __tablename__ = "courses"

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(200))
    # Starts the prefix-cache hash of the engine, so that no course can time another's cache.
    salt: Mapped[str] = mapped_column(String(64), default=new_salt)
    # Number of the newest index generation; the backend opens it when it sees a new number.
    index_generation: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)


class Enrolment(Base):
    __tablename__ = "enrolments"
    __table_args__ = (CheckConstraint("role IN ('student', 'teacher')", name="role"),)

    course_id: Mapped[int] = mapped_column(
        ForeignKey("courses.id", ondelete="CASCADE"), primary_key=True
    )
    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
