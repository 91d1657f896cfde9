"""What the usage route gives."""

from datetime import date

from pydantic import BaseModel


class Totals(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0


class Day(Totals):
    date: date


class UsageOut(BaseModel):
    days: list[Day]
    total: Totals
    budget_tokens: int
    budget_used_today: int
