"""The offline store on S3 with Spark and Delta: both ways of writing give the same table."""

from __future__ import annotations

from typing import Any

import pytest

from clinical_orchestration.stores.feature_store import OfflineStore, load_newest, verify
from clinical_orchestration.stores.online import RedisOnlineStore
from clinical_orchestration.stores.spark import SparkSessions, spark_tables
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import DOMAINS, SILVER_COLUMNS, arrow_schema, silver
from clinical_orchestration_tests.integration.test_features_in_spark import VISITS, Rows, history

pytestmark = pytest.mark.integration


class NoSpark:
    """Fails when it is asked for anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"Spark was asked for {name}")


def write(tables: DeltaTableStore, rows: Rows) -> None:
    import pyarrow as pa

    for domain in DOMAINS:
        columns = SILVER_COLUMNS[domain]
        data = [{column: row.get(column) for column in columns} for row in rows[domain]]
        tables.append(silver(domain), pa.Table.from_pylist(data, arrow_schema(columns)))


def test_refresh_load_and_verify_on_s3_with_spark_and_redis(
    spark_env: dict[str, str], redis_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**spark_env, "CLINICAL_LAKE_ROOT": "s3://clinical-mlops/feature-store"}.items():
        monkeypatch.setenv(name, value)
    tables = DeltaTableStore.from_settings()
    sessions = SparkSessions()
    spark = spark_tables(tables, sessions=sessions)
    rows = history(11, patients=12)
    late = {domain: [row for row in records if row["patient_id"] == "P003"] for domain, records in rows.items()}
    early = {domain: [row for row in records if row["patient_id"] != "P003"] for domain, records in rows.items()}
    write(tables, early)

    offline = OfflineStore(spark, tables)
    first = offline.refresh(VISITS)
    assert first.status == "full"
    assert first.rows == first.changed_rows > first.patients > 5
    assert OfflineStore(NoSpark(), tables).refresh(VISITS).status == "up_to_date"  # type: ignore[arg-type]

    write(tables, late)
    second = offline.refresh(VISITS)
    assert (second.status, second.computed_patients) == ("incremental", 1)
    assert second.rows == first.rows + second.computed_rows
    assert second.computed_rows > 0
    incremental = offline.read(VISITS)

    # many rows: Spark writes them itself, over what is there
    by_spark = OfflineStore(spark, tables, arrow_rows=0)
    third = by_spark.refresh(VISITS, full=True)
    assert (third.status, third.rows) == ("full", second.rows)
    again = by_spark.read(VISITS)
    assert again.columns == incremental.columns
    from polars.testing import assert_frame_equal

    assert_frame_equal(again, incremental, rel_tol=1e-12)

    online = RedisOnlineStore(redis_env["REDIS_URL"], prefix="feature-store-test:")
    assert load_newest(offline, online, VISITS).written == second.patients
    assert verify(offline, online, VISITS).consistent
    sessions.close()
