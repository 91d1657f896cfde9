"""Password hashing with argon2id, a bounded number at a time."""

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from backend.errors import ApiError

MIN_LENGTH = 10
MAX_LENGTH = 256
_PARALLEL_HASHES = 2
_ALPHABET = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


class Passwords:
    """Hashes and checks; at most two at once, because each takes the memory it is meant to take."""

    def __init__(self, memory_kib: int, rounds: int) -> None:
        self._hasher = PasswordHasher(time_cost=rounds, memory_cost=memory_kib, parallelism=4)
        self._slots = threading.BoundedSemaphore(_PARALLEL_HASHES)
        self._nobody = self.hash(secrets.token_urlsafe(16))

    def hash(self, password: str) -> str:
        with self._slots:
            return self._hasher.hash(password)

    def verify(self, stored: str | None, password: str) -> bool:
        """Check a password; without a stored hash it takes the same time and answers False."""
        with self._slots:
            try:
                self._hasher.verify(stored or self._nobody, password[: MAX_LENGTH + 1])
            except (VerifyMismatchError, VerificationError, InvalidHashError):
                return False
        return stored is not None

    def needs_rehash(self, stored: str) -> bool:
        return self._hasher.check_needs_rehash(stored)


def one_time_password() -> str:
    """Four groups of four letters and digits that are hard to confuse (about 93 bits)."""
    groups = ("".join(secrets.choice(_ALPHABET) for _ in range(4)) for _ in range(4))
    return "-".join(groups)


def check_strength(password: str, username: str) -> None:
    """Refuse passwords that are too short, too long, or the user's own name."""
    if len(password) < MIN_LENGTH:
        reason = f"The new password needs at least {MIN_LENGTH} characters."
    elif len(password) > MAX_LENGTH:
        reason = f"The new password may have at most {MAX_LENGTH} characters."
    elif username.casefold() in password.casefold() and len(password) < len(username) + 6:
        reason = "The new password must not be the user name."
    elif len(set(password)) < 4:
        reason = "The new password repeats too few characters. Choose a longer, mixed one."
    else:
        return
    raise ApiError(400, "weak_password", reason, param="new_password")
