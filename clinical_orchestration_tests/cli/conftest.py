"""A database of its own for each test, in the PostgreSQL of the session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from clinical_orchestration.platform import reading
from clinical_orchestration.platform.crypto import new_key


@pytest.fixture
def database(postgres_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty database, which the environment names, with a key for secrets."""
    import psycopg2

    base, _, _ = postgres_env["POSTGRES_URL"].rpartition("/")
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = psycopg2.connect(postgres_env["POSTGRES_URL"])
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f'create database "{name}"')
    monkeypatch.setenv("POSTGRES_URL", f"{base}/{name}")
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
    monkeypatch.setattr(reading, "_warned", set())
    reading.forget()
    yield f"{base}/{name}"
    reading.forget()
    with admin.cursor() as cursor:
        cursor.execute(f'drop database "{name}" with (force)')
    admin.close()
