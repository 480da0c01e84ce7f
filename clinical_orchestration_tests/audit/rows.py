"""Trails to tamper with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from clinical_orchestration.audit.chain import GENESIS, Row, seal
from clinical_orchestration.audit.keys import Signer
from clinical_orchestration.audit.trail import AuditEntry
from clinical_orchestration.platform.crypto import new_key

START = datetime(2026, 1, 1, tzinfo=UTC)


def signer() -> Signer:
    made = Signer.from_fernet(new_key())
    assert made is not None
    return made


def chained(entries: list[AuditEntry], key: Signer | None) -> list[Row]:
    """Return the rows that recording these entries would store."""
    rows: list[Row] = []
    for entry in entries:
        rows.append(seal(entry.values(), len(rows) + 1, rows[-1].hash if rows else GENESIS, key))
    return rows


def entries(count: int) -> list[AuditEntry]:
    return [
        AuditEntry("patch_dag", f"user{n}", "api", dag_id="d", old=n, new={"n": n}, when=START + timedelta(seconds=n))
        for n in range(count)
    ]
