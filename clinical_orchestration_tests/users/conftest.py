"""Users in a database of their own, with a clock that tests move."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import argon2
import pytest

from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration.users import passwords
from clinical_orchestration.users.store import UserStore
from clinical_orchestration_tests.databases import execute, new_database


@pytest.fixture(scope="package")
def own_database(postgres_env: dict[str, str]) -> str:
    """A database for these tests; return its URL."""
    return new_database(postgres_env["POSTGRES_URL"], "users")


@pytest.fixture
def database(own_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same database, empty, as the environment names it."""
    execute(own_database, "drop schema public cascade; create schema public")
    monkeypatch.setenv("POSTGRES_URL", own_database)
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
    return own_database


class Clock:
    """The time now, as a test has it."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def seconds(self) -> float:
        return self.now.timestamp()

    def pass_by(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def users(database: str, clock: Clock) -> UserStore:
    return UserStore(database, clock)


@pytest.fixture
def quick_hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hashes that take a millisecond; the real ones are meant to take long."""
    quick = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", lambda: quick)
    passwords._nobody.cache_clear()
    yield
    passwords._nobody.cache_clear()
