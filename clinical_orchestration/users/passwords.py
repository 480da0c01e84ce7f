"""Passwords at rest: Argon2id with the library's parameters, hashed anew at login when those change."""

from __future__ import annotations

import hmac
import secrets
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argon2 import PasswordHasher

LONGEST_PASSWORD = 1024
"""Characters; a longer one is refused before it costs any work."""


@cache
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher()


@cache
def _nobody() -> str:
    """Return the hash of a password that nobody has: checking it takes as long as checking a user's."""
    return hash_password(secrets.token_urlsafe(16))


def hash_password(password: str) -> str:
    """Return what is stored of a password.

    Raises:
        ValueError: it is empty or longer than :data:`LONGEST_PASSWORD`.
    """
    if not 1 <= len(password) <= LONGEST_PASSWORD:
        raise ValueError(f"a password has 1 to {LONGEST_PASSWORD} characters")
    return _hasher().hash(password)


def verify_password(stored: str | None, password: str) -> bool:
    """Return whether a password is the one that was stored; without one stored it is wrong, after the same work."""
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        right = _hasher().verify(stored or _nobody(), password[:LONGEST_PASSWORD])
    except (VerificationError, InvalidHashError):
        return False
    return right and stored is not None and len(password) <= LONGEST_PASSWORD


def is_outdated(stored: str) -> bool:
    """Return whether a hash was made with other parameters than those of today."""
    return _hasher().check_needs_rehash(stored)


def new_secret() -> str:
    """Return a random secret for a session or a token, of 256 bits."""
    return secrets.token_urlsafe(32)


def fingerprint(secret: str) -> str:
    """Return what is stored of a random secret: its SHA-256 in hexadecimal digits."""
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def csrf_token(session_secret: str) -> str:
    """Return the token that forms of a session carry; only who knows the session's secret can make it."""
    return hmac.new(session_secret.encode(), b"csrf", sha256).hexdigest()
