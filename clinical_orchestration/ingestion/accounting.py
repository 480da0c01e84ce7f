"""The accounts of the lakehouse: reads the positions of every record and hands them to :mod:`..quality.accounting`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clinical_orchestration.quality.accounting import AccountingReport, account
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, DUPLICATES, QUARANTINE, bronze, silver

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = ["trial", "source_position"]


def account_for(tables: TableStore, domains: Sequence[str] = DOMAINS) -> dict[str, AccountingReport]:
    """Prove for each domain that every bronze record is accepted, a duplicate or quarantined, and just one of them.

    Only the key columns are read: about one second for a million records. Bronze is taken as of the version that
    silver has reached, so that records which arrive meanwhile are no violation. Call it when no
    :func:`clinical_orchestration.ingestion.silver.refine` is running.

    Args:
        tables: the lakehouse.
        domains: bronze tables to account for.

    Returns:
        The report of each domain; absent tables count as empty.
    """
    rejected = {name: tables.read(name, columns=[*_KEY, "table"]) for name in (DUPLICATES, QUARANTINE)}
    reports = {}
    for domain in domains:
        reached = tables.transaction_version(silver(domain), bronze(domain))
        received = tables.read(bronze(domain), columns=_KEY, version=reached)
        duplicates, quarantined = (_of(rejected[name], domain) for name in (DUPLICATES, QUARANTINE))
        accepted = tables.read(silver(domain), columns=_KEY)
        reports[domain] = account(domain, received, accepted, duplicates, quarantined)
    return reports


def _of(rows: pa.Table, domain: str) -> pa.Table:
    import pyarrow.compute as pc

    return rows.filter(pc.equal(rows.column("table"), domain)).select(_KEY)
