"""Requests a minute for each user, and the x-ratelimit headers."""

import time

from backend.errors import ApiError
from backend.usage.service import seconds_to_midnight


class RequestWindow:
    """Counts requests in whole minutes of the clock, per user."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._minute = 0
        self._counts: dict[int, int] = {}

    def take(self, user_id: int) -> int:
        """Count one request and return how many are left; raises ApiError 429 when none is."""
        minute = int(time.time() // 60)
        if minute != self._minute:
            self._minute, self._counts = minute, {}
        count = self._counts.get(user_id, 0) + 1
        if count > self.per_minute:
            wait = self.seconds_left()
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"You may make {self.per_minute} requests a minute. Try again in {wait} seconds.",
                headers={"Retry-After": str(wait)},
            )
        self._counts[user_id] = count
        return self.per_minute - count

    @staticmethod
    def seconds_left() -> int:
        return max(1, 60 - int(time.time() % 60))


def ratelimit_headers(
    requests_limit: int, requests_left: int, tokens_limit: int, tokens_left: int
) -> dict[str, str]:
    return {
        "x-ratelimit-limit-requests": str(requests_limit),
        "x-ratelimit-remaining-requests": str(requests_left),
        "x-ratelimit-reset-requests": f"{RequestWindow.seconds_left()}s",
        "x-ratelimit-limit-tokens": str(tokens_limit),
        "x-ratelimit-remaining-tokens": str(max(0, tokens_left)),
        "x-ratelimit-reset-tokens": f"{seconds_to_midnight()}s",
    }
