"""What the key routes take and give."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from backend.keys.models import STANDARD


class KeyIn(BaseModel):
    name: str = Field(min_length=1, max_length=100)
    expires_in_days: int | None = Field(default=None, ge=1, le=3650)
    service_class: str = Field(default=STANDARD, max_length=32)


class KeyChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    service_class: str = Field(max_length=32)


class KeyOut(BaseModel):
    id: int
    name: str
    prefix: str
    last4: str
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked: bool
    service_class: str


class KeyCreated(KeyOut):
    key: str
