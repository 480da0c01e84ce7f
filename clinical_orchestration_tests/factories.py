"""Small records and files, as the platform receives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.tables import BRONZE_COLUMNS, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

NOW = datetime(2025, 2, 1, 12, tzinfo=UTC)
START = datetime(2025, 1, 1, tzinfo=UTC)


def vitals_message(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a valid vitals message; `number` makes its patient and time."""
    return {
        "patient_id": f"P{number % 7:03d}",
        "timestamp": (START + timedelta(hours=number)).isoformat().replace("+00:00", "Z"),
        "heart_rate": 60 + number % 40,
        "blood_pressure_systolic": 120,
        "blood_pressure_diastolic": 80,
        "temperature": 36.6,
        "spo2": 98,
        "source": "monitor",
        "trial_site": "S1",
        "trial_arm": "placebo",
        **changes,
    }


def bronze_messages(
    messages: Sequence[Mapping[str, Any] | str],
    *,
    start: int = 0,
    topic: str = "patient-vitals",
    trial: str = "simulated",
    received_at: datetime = NOW,
) -> pa.Table:
    """Return bronze rows of Kafka messages at offsets from `start`; a text is taken as it is."""
    import pyarrow as pa

    rows = [
        {
            "source": f"kafka:{topic}",
            "source_position": f"{topic}-0-{start + number}",
            "ingested_at": received_at,
            "received_at": received_at,
            "trial": trial,
            "record_format": "message",
            "payload": message if isinstance(message, str) else json.dumps(message),
            "payload_encoding": "utf-8",
        }
        for number, message in enumerate(messages)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(BRONZE_COLUMNS))


def sdtm_rows(domain: str, count: int = 6) -> list[dict[str, Any]]:
    """Return SDTM rows of ``VS``, ``CM``, ``EX`` or ``DM`` for two subjects."""
    rows = []
    for number in range(count):
        subject = f"01-70{number % 2}"
        day = (START + timedelta(days=number)).date().isoformat()
        common: dict[str, Any] = {"STUDYID": "CDISCPILOT01", "DOMAIN": domain, "USUBJID": subject}
        details: dict[str, dict[str, Any]] = {
            "VS": {
                "VSSEQ": number + 1, "VSTESTCD": "PULSE", "VSTEST": "Pulse Rate", "VSORRES": str(60 + number),
                "VSORRESU": "BEATS/MIN", "VSSTRESN": 60 + number, "VSSTRESU": "BEATS/MIN", "VISIT": "BASELINE",
                "VSDTC": day,
            },
            "CM": {"CMSEQ": number + 1, "CMTRT": "ASPIRIN", "CMSTDTC": day, "CMDTC": day},
            "EX": {"EXSEQ": number + 1, "EXTRT": "PLACEBO", "EXDOSE": 0, "EXDOSU": "mg", "EXSTDTC": day},
            "DM": {"SUBJID": subject, "SITEID": "701", "AGE": 70, "AGEU": "YEARS", "SEX": "F", "DMDTC": day},
        }  # fmt: skip
        rows.append(common | details[domain])
    return rows


def write_sdtm(folder: Path, domain: str, rows: Sequence[Mapping[str, Any]], suffix: str = "csv") -> Path:
    """Write rows as ``<domain>.<suffix>`` (csv or parquet) and return the file."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{domain.lower()}.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
