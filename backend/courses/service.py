"""Courses and enrolment."""

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from backend.accounts.models import User
from backend.accounts.service import find
from backend.courses.models import Course, Enrolment
from backend.database import Database
from backend.errors import ApiError, not_found


def courses_of(database: Database, user: User) -> list[tuple[Course, str]]:
    """Courses with the role of the user in each; administrators act as teachers in all."""
    with database.read() as session:
        if user.role == "administrator":
            courses = session.execute(select(Course).order_by(Course.slug)).scalars()
            return [(course, "teacher") for course in courses]
        rows = session.execute(
            select(Course, Enrolment.role)
            .join(Enrolment, Enrolment.course_id == Course.id)
            .where(Enrolment.user_id == user.id)
            .order_by(Course.slug)
        )
        return [(course, _effective(user, role)) for course, role in rows]


def _effective(user: User, enrolled_as: str) -> str:
    """A student's account never teaches, whatever an old enrolment says."""
    return "student" if user.role == "student" else enrolled_as


def course_for(session: Session, user: User, course_id: int) -> tuple[Course, str] | None:
    """The course and the user's role in it; None when it does not exist or is not theirs."""
    if user.role == "administrator":
        course = session.get(Course, course_id)
        return (course, "teacher") if course is not None else None
    row = session.execute(
        select(Course, Enrolment.role)
        .join(Enrolment, Enrolment.course_id == Course.id)
        .where(Course.id == course_id, Enrolment.user_id == user.id)
    ).one_or_none()
    return (row[0], _effective(user, row[1])) if row is not None else None


def create_course(database: Database, owner: User, slug: str, name: str) -> Course:
    """Make a course; a teacher who makes one teaches it. Raises ApiError 409 on a taken slug."""
    course = Course(slug=slug, name=name)
    try:
        with database.write() as session:
            session.add(course)
            session.flush()
            if owner.role == "teacher":
                session.add(Enrolment(course_id=course.id, user_id=owner.id, role="teacher"))
    except IntegrityError as error:
        raise ApiError(
            409,
            "slug_taken",
            f"There is already a course with the short name {slug}.",
            param="slug",
        ) from error
    return course


def members(database: Database, course_id: int) -> list[tuple[User, str]]:
    with database.read() as session:
        rows = session.execute(
            select(User, Enrolment.role)
            .join(Enrolment, Enrolment.user_id == User.id)
            .where(Enrolment.course_id == course_id)
            .order_by(Enrolment.role.desc(), User.username)
        )
        return [(user, role) for user, role in rows]


def enrol(database: Database, course_id: int, username: str, role: str) -> User:
    """Add a member or change the role of one; only teachers' accounts can teach."""
    with database.write() as session:
        user = find(session, username)
        if user is None or not user.active:
            raise ApiError(
                404, "not_found", f"There is no active user called {username}.", param="username"
            )
        if role == "teacher" and user.role == "student":
            raise ApiError(
                400,
                "invalid_value",
                "A student's account cannot teach a course. Ask an administrator to make the "
                "account a teacher's first.",
                param="role",
            )
        enrolment = session.get(Enrolment, (course_id, user.id))
        if enrolment is None:
            session.add(Enrolment(course_id=course_id, user_id=user.id, role=role))
        else:
            enrolment.role = role
    return user


def remove_member(database: Database, course_id: int, user_id: int) -> None:
    with database.write() as session:
        removed = session.execute(
            delete(Enrolment)
            .where(Enrolment.course_id == course_id, Enrolment.user_id == user_id)
            .returning(Enrolment.user_id)
        ).first()
        if removed is None:
            raise not_found("member")
