"""Databases of their own for tests, in the PostgreSQL of the session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest


def execute(url: str, statement: str) -> None:
    """Execute a statement, committed by itself."""
    import psycopg2

    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


def new_database(url: str, name: str) -> str:
    """Make an empty database beside that of `url`; return its URL. It goes with the PostgreSQL of the session."""
    execute(url, f'CREATE DATABASE "{name}"')
    return f"{url.rpartition('/')[0]}/{name}"


@contextmanager
def temporary_database(url: str, prefix: str = "test") -> Iterator[str]:
    """Make an empty database beside that of `url`, yield its URL, and drop it."""
    name = f"{prefix}_{uuid.uuid4().hex[:12]}"
    try:
        yield new_database(url, name)
    finally:
        execute(url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture
def stored_configuration(postgres_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty database, which the environment names, with a key for secrets."""
    from clinical_orchestration.platform import reading
    from clinical_orchestration.platform.crypto import new_key

    with temporary_database(postgres_env["POSTGRES_URL"]) as url:
        monkeypatch.setenv("POSTGRES_URL", url)
        monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
        monkeypatch.setattr(reading, "_warned", set())
        reading.forget()
        yield url
        reading.forget()
