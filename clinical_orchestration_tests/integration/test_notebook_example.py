"""The example notebook as a script, on real S3 and Redis: every cell runs on a small simulated trial."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from clinical_orchestration.features.definitions import feature_names, feature_set_id
from clinical_orchestration.simulation.messages import simulate
from clinical_orchestration.stores.online import OnlineFeatures, RedisOnlineStore
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import (
    DOMAINS,
    FEATURE_KEY_COLUMNS,
    FEATURES,
    QUARANTINE,
    QUARANTINE_COLUMNS,
    SILVER_COLUMNS,
    arrow_schema,
    silver,
)
from clinical_orchestration.transforms.decode import decode_batch
from clinical_orchestration.trials import load_trial

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PROFILE = load_trial("simulated")
NOW = datetime(2025, 6, 1, tzinfo=UTC)


def fill(tables: DeltaTableStore) -> None:
    """Write what eight simulated patients sent in two days to silver, and what was rejected to quarantine."""
    assert PROFILE.sources.simulation is not None
    small = PROFILE.sources.simulation.model_copy(update={"subjects": 8, "days": 2.0, "broken_rate": 0.02})
    records: dict[str, dict[bytes, dict[str, object]]] = {domain: {} for domain in DOMAINS}
    for message in simulate(small, PROFILE.study_id):
        if message.value is not None and message.kind != "duplicate":
            text = message.value.decode("utf-8", "replace")
            records[message.domain][message.value] = {
                "source": "kafka:test", "source_position": f"{message.domain}-0-{message.sequence}",
                "ingested_at": NOW, "received_at": message.arrival, "trial": PROFILE.name,
                "record_format": "message", "payload": text, "payload_encoding": "utf-8",
            }  # fmt: skip
    rejected: list[dict[str, object]] = []
    for domain, found in records.items():
        accepted, refused = decode_batch(domain, found.values(), {PROFILE.name: PROFILE})
        schema = arrow_schema(SILVER_COLUMNS[domain])
        tables.append(silver(domain), pa.Table.from_pylist(accepted, schema=schema))
        rejected += [{**row, "table": domain, "quarantined_at": NOW} for row in refused]
    rows = [{column: row.get(column) for column in QUARANTINE_COLUMNS} for row in rejected]
    tables.append(QUARANTINE, pa.Table.from_pylist(rows, schema=arrow_schema(QUARANTINE_COLUMNS)))


def fill_features(tables: DeltaTableStore, redis_url: str) -> None:
    """Write the heart rate's mean of each patient and six hours as features, offline and the newest online.

    What features the platform computes is tested with Spark elsewhere; the example only reads them.
    """
    names = feature_names(PROFILE)
    mean = next(name for name in names if name.startswith("heart_rate") and "mean" in name and "6h" in name)
    vitals = pl.DataFrame(pl.from_arrow(tables.read(silver("patient_vitals"))))
    windows = (
        vitals.filter(pl.col("test_code") == "HR")
        .group_by("patient_id", feature_time=pl.col("event_time").dt.truncate("6h") + pl.duration(hours=6))
        .agg(pl.col("value").mean().alias(mean))
    )
    empty = [pl.lit(None, pl.Float64).alias(name) for name in names if name != mean]
    rows = windows.with_columns(*empty, trial=pl.lit(PROFILE.name), feature_date=pl.col("feature_time").dt.date())
    rows = rows.select(*FEATURE_KEY_COLUMNS, *names).sort("patient_id", "feature_time")
    tables.append(FEATURES, rows.to_arrow())
    newest = rows.unique("patient_id", keep="last").iter_rows(named=True)
    identity = feature_set_id(PROFILE)
    RedisOnlineStore(redis_url, "notebook:").put(
        OnlineFeatures(
            row["patient_id"], PROFILE.name, row["feature_time"], {name: row[name] for name in names}, identity
        )
        for row in newest
    )


@pytest.fixture
def environment(s3_env: dict[str, str], redis_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    extra = {
        "CLINICAL_LAKE_ROOT": "s3://clinical-mlops/notebook",
        "CLINICAL_TRIAL": PROFILE.name,
        "REDIS_URL": redis_env["REDIS_URL"],
        "CLINICAL_VAR_FEATURE_STORE_REDIS_PREFIX": "notebook:",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "SERVING_URL": "http://127.0.0.1:9",
        "POSTGRES_URL": "",
    }
    for name, value in {**s3_env, **extra}.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


def test_every_cell_runs_on_a_small_simulated_trial(environment: dict[str, str]) -> None:
    tables = DeltaTableStore.from_settings()
    fill(tables)
    fill_features(tables, environment["REDIS_URL"])
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "notebook.py")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    shown = ended.stdout
    assert "8 patients" in shown
    assert "range" in shown  # the message with a heart rate of 400
    assert "of 8 patients" in shown
    assert "age: " in shown
    assert "online features of 2025-01-0" in shown
    assert "equal" in shown
    assert "differing" not in shown
    assert "events have features" in shown
    assert "models: " in shown  # MLflow is away: said in one line, and no cell fails
    assert environment["AWS_SECRET_ACCESS_KEY"] not in shown + ended.stderr
