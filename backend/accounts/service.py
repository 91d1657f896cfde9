"""Logins and the life of an account."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from backend.accounts import backoff, sessions
from backend.accounts.models import Role, User
from backend.accounts.passwords import Passwords, check_strength, one_time_password
from backend.accounts.schemas import UserChange
from backend.database import Database, utcnow
from backend.errors import ApiError, not_found
from backend.keys.models import ApiKey
from backend.settings import Settings


@dataclass(frozen=True)
class Login:
    token: str
    expires_at: datetime
    user: User


def find(session: Session, username: str) -> User | None:
    return session.execute(
        select(User).where(func.lower(User.username) == username.lower())
    ).scalar_one_or_none()


def login(
    database: Database,
    passwords: Passwords,
    settings: Settings,
    username: str,
    password: str,
    address: str,
) -> Login:
    """Check name and password. Unknown, wrong and deactivated look alike, also in time taken."""
    backoff.begin_attempt(database, username, address)
    with database.read() as session:
        user = find(session, username)
    right = passwords.verify(user.password_hash if user else None, password)
    if user is None or not right or not user.active:
        raise ApiError(401, "invalid_credentials", "The user name or the password is wrong.")
    rehashed = passwords.hash(password) if passwords.needs_rehash(user.password_hash) else None
    with database.write() as session:
        backoff.forgive(session, username, address)
        if rehashed is not None:
            session.execute(
                update(User)
                .where(User.id == user.id, User.password_hash == user.password_hash)
                .values(password_hash=rehashed)
            )
        token, expires_at = sessions.start(session, user.id, settings.session_hours)
    return Login(token, expires_at, user)


def change_password(
    database: Database,
    passwords: Passwords,
    settings: Settings,
    user: User,
    current: str,
    new: str,
    address: str,
) -> Login:
    """Set a new password; every session of the user ends and one new one begins."""
    # What is no guess at the password costs no attempt.
    check_strength(new, user.username)
    backoff.begin_attempt(database, user.username, address)
    if not passwords.verify(user.password_hash, current):
        raise ApiError(
            400, "wrong_password", "The current password is wrong.", param="current_password"
        )
    if new == current:
        with database.write() as session:
            backoff.forgive(session, user.username, address)
        raise ApiError(
            400,
            "weak_password",
            "The new password is the old one. Choose another.",
            param="new_password",
        )
    new_hash = passwords.hash(new)
    with database.write() as session:
        changed = session.get(User, user.id)
        if changed is None:
            raise not_found("user")
        changed.password_hash = new_hash
        changed.must_change_password = False
        backoff.forgive(session, user.username, address)
        sessions.end_all(session, user.id)
        token, expires_at = sessions.start(session, user.id, settings.session_hours)
    if changed.role == "administrator":
        remove_initial_login(settings.initial_login)
    return Login(token, expires_at, changed)


def remove_initial_login(path: Path) -> None:
    """The first passwords lie in a file only until the administrator has chosen another."""
    path.unlink(missing_ok=True)


def create_user(
    database: Database, passwords: Passwords, username: str, display_name: str, role: Role
) -> tuple[User, str]:
    """Make an account with a one-time password; raises ApiError 409 when the name is taken."""
    password = one_time_password()
    user = User(
        username=username,
        display_name=display_name or username,
        role=role,
        password_hash=passwords.hash(password),
        must_change_password=True,
        active=True,
    )
    taken = ApiError(
        409, "username_taken", f"There is already a user called {username}.", param="username"
    )
    try:
        with database.write() as session:
            if find(session, username) is not None:
                raise taken
            session.add(user)
    except IntegrityError as error:
        raise taken from error
    return user, password


def reset_password(database: Database, passwords: Passwords, user_id: int) -> str:
    """Give a one-time password; it must be changed at the next login, and all sessions end."""
    password = one_time_password()
    hashed = passwords.hash(password)
    with database.write() as session:
        user = session.get(User, user_id)
        if user is None:
            raise not_found("user")
        user.password_hash = hashed
        user.must_change_password = True
        sessions.end_all(session, user_id)
        backoff.forgive_account(session, user.username)
    return password


def change_user(database: Database, user_id: int, change: UserChange) -> User:
    """Change name, role or state. Deactivating ends sessions and keys at once; running streams
    notice it within seconds (see gateway.streams)."""
    with database.write() as session:
        user = session.execute(
            select(User).where(User.id == user_id).with_for_update()
        ).scalar_one_or_none()
        if user is None:
            raise not_found("user")
        loses_admin = user.role == "administrator" and (
            change.active is False or change.role not in (None, "administrator")
        )
        if loses_admin and user.active and _other_administrators(session, user_id) == 0:
            raise ApiError(
                409,
                "last_administrator",
                "This is the last active administrator. Make another one first.",
            )
        if change.display_name is not None:
            user.display_name = change.display_name
        if change.role is not None and change.role != user.role:
            user.role = change.role
            sessions.end_all(session, user_id)
        if change.active is not None:
            user.active = change.active
        if change.active is False:
            sessions.end_all(session, user_id)
            session.execute(
                update(ApiKey)
                .where(ApiKey.user_id == user_id, ApiKey.revoked_at.is_(None))
                .values(revoked_at=utcnow())
            )
    return user


def _other_administrators(session: Session, user_id: int) -> int:
    return session.execute(
        select(func.count())
        .select_from(User)
        .where(User.role == "administrator", User.active.is_(True), User.id != user_id)
    ).scalar_one()


def list_users(database: Database) -> list[User]:
    with database.read() as session:
        return list(session.execute(select(User).order_by(User.username)).scalars())
