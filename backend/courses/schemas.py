"""What the course routes take and give."""

from typing import Literal

from pydantic import BaseModel, Field

CourseRole = Literal["student", "teacher"]


class CourseIn(BaseModel):
    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    name: str = Field(min_length=1, max_length=200)


class CourseOut(BaseModel):
    id: int
    slug: str
    name: str
    role: CourseRole


class MemberIn(BaseModel):
    username: str = Field(min_length=1, max_length=128)
    role: CourseRole = "student"


class MemberOut(BaseModel):
    id: int
    username: str
    display_name: str
    role: CourseRole
