"""An empty database for each test, with a key and an anchor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.platform.crypto import new_key
from clinical_orchestration_tests.databases import temporary_database


@pytest.fixture
def database(postgres_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of the database, which the environment names."""
    with temporary_database(postgres_env["POSTGRES_URL"], "audit") as url:
        monkeypatch.setenv("POSTGRES_URL", url)
        monkeypatch.setenv("CLINICAL_FERNET_KEY", new_key())
        monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
        yield url


@pytest.fixture
def trail(database: str) -> AuditTrail:
    """A trail without rows, of the environment's key and home."""
    return AuditTrail(database)
