"""Server-side sessions: random tokens of which only a hash is stored."""

import hashlib
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from backend.accounts.models import LoginSession, User
from backend.database import utcnow

COOKIE = "lectern_session"


def token_hash(token: str) -> str:
    """SHA-256 is enough: the token has 256 random bits, so there is nothing to guess slowly."""
    return hashlib.sha256(token.encode()).hexdigest()


def start(session: Session, user_id: int, hours: int) -> tuple[str, datetime]:
    """Make a session and return its token (shown once) and its end. Old ones are swept out."""
    now = utcnow()
    token = secrets.token_urlsafe(32)
    expires_at = now + timedelta(hours=hours)
    session.execute(delete(LoginSession).where(LoginSession.expires_at < now))
    session.add(
        LoginSession(
            token_hash=token_hash(token), user_id=user_id, created_at=now, expires_at=expires_at
        )
    )
    return token, expires_at


def find_user(session: Session, token: str) -> User | None:
    """The active user of a live session, or None."""
    return session.execute(
        select(User)
        .join(LoginSession, LoginSession.user_id == User.id)
        .where(
            LoginSession.token_hash == token_hash(token),
            LoginSession.expires_at > utcnow(),
            User.active.is_(True),
        )
    ).scalar_one_or_none()


def end(session: Session, token: str) -> None:
    session.execute(delete(LoginSession).where(LoginSession.token_hash == token_hash(token)))


def end_all(session: Session, user_id: int) -> None:
    session.execute(delete(LoginSession).where(LoginSession.user_id == user_id))
