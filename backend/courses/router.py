"""Courses and their members."""

from typing import cast

from fastapi import APIRouter, Response

from backend.accounts.dependencies import CurrentUser, Teacher
from backend.accounts.models import User
from backend.context import ContextDep
from backend.courses import service
from backend.courses.dependencies import CourseTeacher
from backend.courses.schemas import CourseIn, CourseOut, CourseRole, MemberIn, MemberOut
from backend.ids import RowId

router = APIRouter(prefix="/api/courses", tags=["courses"])


def _member(user: User, role: str) -> MemberOut:
    return MemberOut(
        id=user.id,
        username=user.username,
        display_name=user.display_name,
        role=cast(CourseRole, role),
    )


@router.get("")
def list_courses(user: CurrentUser, context: ContextDep) -> list[CourseOut]:
    rows = service.courses_of(context.database, user)
    return [
        CourseOut(id=c.id, slug=c.slug, name=c.name, role=cast(CourseRole, role))
        for c, role in rows
    ]


@router.post("", status_code=201)
def create_course(body: CourseIn, user: Teacher, context: ContextDep) -> CourseOut:
    course = service.create_course(context.database, user, body.slug, body.name)
    return CourseOut(id=course.id, slug=course.slug, name=course.name, role="teacher")


@router.get("/{course_id}/members")
def list_members(teacher: CourseTeacher, context: ContextDep) -> list[MemberOut]:
    rows = service.members(context.database, teacher.course.id)
    return [_member(user, role) for user, role in rows]


@router.post("/{course_id}/members", status_code=201)
def add_member(body: MemberIn, teacher: CourseTeacher, context: ContextDep) -> MemberOut:
    user = service.enrol(context.database, teacher.course.id, body.username, body.role)
    return _member(user, body.role)


@router.delete("/{course_id}/members/{user_id}", status_code=204)
def remove_member(user_id: RowId, teacher: CourseTeacher, context: ContextDep) -> Response:
    service.remove_member(context.database, teacher.course.id, user_id)
    return Response(status_code=204)
