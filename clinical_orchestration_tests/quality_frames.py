"""Silver and quarantine frames of a trial without Spark: the platform's own decoder on simulated messages or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa

from clinical_orchestration.simulation import SimulatedMessage, simulate
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import (
    BRONZE_COLUMNS,
    DOMAINS,
    QUARANTINE,
    QUARANTINE_COLUMNS,
    SILVER_COLUMNS,
    arrow_schema,
    bronze,
    silver,
)
from clinical_orchestration.transforms.decode import decode_batch
from clinical_orchestration.trials import TrialProfile, load_trial
from clinical_orchestration.trials.profile import Incident, SimulationSettings


def simulated_bronze(
    settings: SimulationSettings, trial: str = "simulated", until: datetime | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return bronze rows by domain of what arrived until a time, without repeats of the same bytes."""
    rows: dict[str, list[dict[str, Any]]] = {domain: [] for domain in DOMAINS}
    for message in simulate(settings, "SIMULATED01"):
        if until is not None and message.arrival > until:
            break
        if message.kind != "duplicate":
            rows[message.domain].append(_bronze_row(message, trial, len(rows[message.domain])))
    return rows


def _bronze_row(message: SimulatedMessage, trial: str, offset: int) -> dict[str, Any]:
    topic = message.domain.replace("_", "-")
    value, encoding = message.value, "utf-8"
    try:
        payload = None if value is None else value.decode()
    except UnicodeDecodeError:
        payload, encoding = "AAAA", "base64"
    return {
        "source": f"kafka:{topic}", "source_position": f"{topic}-0-{offset}", "ingested_at": message.arrival,
        "received_at": message.arrival, "trial": trial, "record_format": "message", "payload": payload,
        "payload_encoding": encoding,
    }  # fmt: skip


def decoded(bronze_rows: Mapping[str, Iterable[Mapping[str, Any]]], profile: TrialProfile) -> dict[str, pl.DataFrame]:
    """Return the silver frames by domain, and ``quarantine``."""
    frames: dict[str, pl.DataFrame] = {}
    rejected: list[dict[str, Any]] = []
    for domain in DOMAINS:
        accepted, refused = decode_batch(domain, bronze_rows.get(domain, ()), {profile.name: profile})
        table = pa.Table.from_pylist(accepted, schema=arrow_schema(SILVER_COLUMNS[domain]))
        frames[domain] = pl.DataFrame(table).unique(
            "record_key" if domain != "patient_vitals" else None, maintain_order=True
        )
        rejected += [{**row, "table": domain, "quarantined_at": row["ingested_at"]} for row in refused]
    frames["quarantine"] = pl.DataFrame(pa.Table.from_pylist(rejected, schema=arrow_schema(QUARANTINE_COLUMNS)))
    return frames


def simulated_frames(
    *,
    seed: int = 1,
    subjects: int = 60,
    sites: int = 6,
    days: float = 5.0,
    incidents: tuple[Incident, ...] = (),
    until_day: float | None = None,
    **settings: Any,
) -> dict[str, pl.DataFrame]:
    """Return the frames of a small simulated trial."""
    chosen = SimulationSettings(seed=seed, subjects=subjects, sites=sites, days=days, incidents=incidents, **settings)
    until = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=days if until_day is None else until_day)
    return decoded(simulated_bronze(chosen, until=until), load_trial("simulated"))


def pilot_bronze() -> dict[str, list[dict[str, Any]]]:
    """Return the bronze rows of the CDISC pilot."""
    from clinical_orchestration.ingestion.files import source_files
    from clinical_orchestration.stores.sdtm_files import read_records

    rows: dict[str, list[dict[str, Any]]] = {domain: [] for domain in DOMAINS}
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for file in source_files(load_trial("cdisc-pilot")):
        number = 0
        for chunk in read_records(file, 200_000):
            for payload in chunk:
                rows[file.table].append({
                    "source": f"file:{file.name}", "source_position": file.position(number), "ingested_at": now,
                    "received_at": None, "trial": "cdisc-pilot", "record_format": file.record_format,
                    "payload": payload, "payload_encoding": "utf-8",
                })  # fmt: skip
                number += 1
    return rows


def fill(
    tables: TableStore, bronze_rows: Mapping[str, Iterable[Mapping[str, Any]]], profile: TrialProfile
) -> dict[str, pl.DataFrame]:
    """Write bronze, silver and quarantine of a trial, as ingestion leaves them; return the frames."""
    frames = decoded(bronze_rows, profile)
    for domain in DOMAINS:
        rows = pa.Table.from_pylist(
            [dict(row) for row in bronze_rows.get(domain, ())], schema=arrow_schema(BRONZE_COLUMNS)
        )
        version = tables.append(bronze(domain), rows)
        tables.append(silver(domain), frames[domain].to_arrow(), transactions={bronze(domain): version or 0})
    tables.append(QUARANTINE, frames["quarantine"].to_arrow())
    return frames
