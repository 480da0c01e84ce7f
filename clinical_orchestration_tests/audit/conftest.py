"""An empty database for each test, with a key and an anchor."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.platform.crypto import new_key


@pytest.fixture
def database(postgres_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of the database, which the environment names."""
    base, _, _ = postgres_env["POSTGRES_URL"].rpartition("/")
    name = f"audit_{uuid.uuid4().hex[:12]}"
    admin = psycopg2.connect(postgres_env["POSTGRES_URL"])
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f'create database "{name}"')
    monkeypatch.setenv("POSTGRES_URL", f"{base}/{name}")
    monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    yield f"{base}/{name}"
    with admin.cursor() as cursor:
        cursor.execute(f'drop database "{name}" with (force)')
    admin.close()


@pytest.fixture
def trail(database: str) -> AuditTrail:
    """A trail without rows, of the environment's key and home."""
    return AuditTrail(database)
