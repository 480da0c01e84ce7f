"""A stand-in for the audit trail."""

from __future__ import annotations

from clinical_orchestration.audit.trail import AuditEntry, AuditError


class TrailInMemory:
    """Keeps what it is told in `entries`; while `broken`, it fails as one without a database does."""

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self.broken = False

    def record(self, entry: AuditEntry) -> int:
        """Keep an entry; return its number."""
        if self.broken:
            raise AuditError("no database")
        self.entries.append(entry)
        return len(self.entries)
