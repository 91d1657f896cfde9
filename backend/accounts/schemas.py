"""What the account routes take and give."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from backend.accounts.models import Role

USERNAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"


class LoginIn(BaseModel):
    username: str = Field(min_length=1, max_length=128)
    password: str = Field(min_length=1, max_length=1024)


class PasswordIn(BaseModel):
    current_password: str = Field(min_length=1, max_length=1024)
    new_password: str = Field(min_length=1, max_length=1024)


class UserOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    username: str
    display_name: str
    role: Role
    must_change_password: bool


class UserAdminOut(UserOut):
    active: bool
    created_at: datetime


class LoginOut(BaseModel):
    token: str
    expires_at: datetime
    user: UserOut


class UserIn(BaseModel):
    username: str = Field(pattern=USERNAME_PATTERN)
    display_name: str = Field(default="", max_length=128)
    role: Role


class UserChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    active: bool | None = None
    role: Role | None = None
    display_name: str | None = Field(default=None, min_length=1, max_length=128)


class UserCreated(BaseModel):
    user: UserAdminOut
    one_time_password: str


class OneTimePassword(BaseModel):
    one_time_password: str


class MyCourse(BaseModel):
    id: int
    slug: str
    name: str
    role: str


class ModelState(BaseModel):
    id: str | None
    untrained: bool
    available: bool


class MeOut(BaseModel):
    user: UserOut
    courses: list[MyCourse]
    model: ModelState
