"""Loading a course and checking membership in one step, so that no route can do half of it."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from backend.accounts.dependencies import CurrentUser
from backend.accounts.models import User
from backend.context import ContextDep
from backend.courses.models import Course
from backend.courses.service import course_for
from backend.errors import ApiError, not_found
from backend.ids import RowId


@dataclass(frozen=True)
class Membership:
    """A user inside a course that is theirs."""

    user: User
    course: Course
    role: str


def course_member(course_id: RowId, user: CurrentUser, context: ContextDep) -> Membership:
    with context.database.read() as session:
        found = course_for(session, user, course_id)
    if found is None:
        raise not_found("course")
    return Membership(user, *found)


Member = Annotated[Membership, Depends(course_member)]


def course_teacher(member: Member) -> Membership:
    if member.role != "teacher":
        raise ApiError(403, "permission_denied", "Only teachers of this course may do this.")
    return member


CourseTeacher = Annotated[Membership, Depends(course_teacher)]
