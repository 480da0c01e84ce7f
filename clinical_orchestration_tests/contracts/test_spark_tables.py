"""One suite for every SparkTables: Spark's own connectors (all appends, and large ones only), and through Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest

from clinical_orchestration import tables as names
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.spark import (
    ArrowSparkTables,
    DeltaSparkTables,
    SparkSessions,
    SparkTables,
    SparkUnavailableError,
    spark_tables,
)
from clinical_orchestration.stores.tables import DeltaTableStore, known_schema, storage_options
from clinical_orchestration_tests.factories import bronze_messages, vitals_message
from clinical_orchestration_tests.fakes import InMemoryTableStore

VITALS = names.bronze("patient_vitals")


def client_settings(environment: dict[str, str]) -> ClientSettings:
    return ClientSettings.model_validate(environment)


@pytest.fixture(scope="module")
def sessions(spark_env: dict[str, str]) -> Iterator[SparkSessions]:
    sessions = SparkSessions(client_settings(spark_env))
    yield sessions
    sessions.close()


KINDS = ["spark-folder", "spark-s3", "small_by_arrow-s3", "arrow-folder"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(kind: str, spark_env: dict[str, str], tmp_path: Path) -> DeltaTableStore:
    if kind.endswith("folder"):
        return DeltaTableStore(str(tmp_path))
    return DeltaTableStore(f"s3://clinical-mlops/{uuid4().hex}", storage_options(client_settings(spark_env)))


@pytest.fixture
def tables(kind: str, sessions: SparkSessions, store: DeltaTableStore) -> SparkTables:
    if kind.startswith("arrow"):
        return ArrowSparkTables(sessions, store)
    return DeltaSparkTables(sessions, store, arrow_rows=0 if kind.startswith("spark") else 1000)


def rows(tables: SparkTables, name: str) -> list[dict[str, Any]]:
    return [row.asDict() for row in tables.read(name).collect()]


@pytest.mark.integration
def test_reads_appends_and_transactions(tables: SparkTables, store: DeltaTableStore) -> None:
    # an absent table that is known
    assert tables.read(names.QUARANTINE).count() == 0
    assert store.read(names.QUARANTINE).schema == known_schema(names.QUARANTINE)
    # increments of what the other engine wrote
    first = store.append(VITALS, bronze_messages([vitals_message(0)]))
    second = store.append(VITALS, bronze_messages([vitals_message(1), vitals_message(2)], start=1))
    assert first is not None
    assert second is not None
    appended = tables.read_appended(VITALS, first, second, rows=2)
    found = {(row["source_position"], row["_commit_version"]) for row in appended.collect()}
    assert found == {("patient-vitals-0-1", second), ("patient-vitals-0-2", second)}
    assert tables.read_appended(VITALS, second, second).count() == 0
    assert tables.read(VITALS, first).count() == 1
    # appends are recorded, once
    df = appended.selectExpr(
        "'patient_vitals' AS table", "trial", "source", "source_position", "array('a: b') AS reasons", "payload",
        "ingested_at AS quarantined_at",
    )  # fmt: skip
    assert tables.append(names.QUARANTINE, df, app_id="bronze/x", app_version=second, rows=2) is not None
    assert tables.append(names.QUARANTINE, df, app_id="bronze/x", app_version=second, rows=2) is None
    assert tables.append(names.QUARANTINE, df, app_id="bronze/x", app_version=second - 1) is None
    assert tables.transaction_version(names.QUARANTINE, "bronze/x") == second
    assert store.row_count(names.QUARANTINE) == 2
    assert store.read(names.QUARANTINE).schema == known_schema(names.QUARANTINE)
    assert store.read(names.QUARANTINE).to_pylist()[0]["reasons"] == ["a: b"]
    # progress without rows
    assert tables.append(names.QUARANTINE, df.limit(0), app_id="bronze/y", app_version=7, rows=0) is not None
    assert tables.transaction_version(names.QUARANTINE, "bronze/y") == 7
    assert store.row_count(names.QUARANTINE) == 2


@pytest.mark.integration
def test_partitions_are_replaced_and_columns_added(tables: SparkTables, store: DeltaTableStore) -> None:
    name, columns = "gold/by_day", "day string, value double"
    session = tables.session
    tables.replace_partitions(name, session.createDataFrame([("a", 1.0), ("b", 2.0)], columns), ["day"])
    assert store.history(name)[-1]["operation"].startswith("CREATE")
    wider = session.createDataFrame([("a", 3.0, 1.5)], columns + ", more double")
    version = tables.replace_partitions(name, wider, ["day"], "day = 'a'")
    assert version == store.version(name)
    assert sorted((row["day"], row["value"], row["more"]) for row in rows(tables, name)) == [
        ("a", 3.0, 1.5),
        ("b", 2.0, None),
    ]
    tables.replace_partitions(name, session.createDataFrame([("c", 9.0)], columns))
    assert rows(tables, name) == [{"day": "c", "value": 9.0}]
    assert store.read(name).to_pylist() == [{"day": "c", "value": 9.0}]
    assert pa.types.is_float64(store.read(name).schema.field("value").type)


def test_an_unknown_absent_table_is_a_key_error() -> None:
    store = InMemoryTableStore()
    for tables in (DeltaSparkTables(SparkSessions(), store), ArrowSparkTables(SparkSessions(), store)):
        with pytest.raises(KeyError):
            tables.read("gold/no_such_table")


def test_a_missing_server_is_named_at_once() -> None:
    settings = ClientSettings.model_validate({"SPARK_REMOTE": "sc://127.0.0.1:1"})
    with pytest.raises(SparkUnavailableError, match=r"127\.0\.0\.1:1.*SPARK_REMOTE"):
        SparkSessions(settings).get()


@pytest.mark.parametrize(("connectors", "kind"), [("true", DeltaSparkTables), ("false", ArrowSparkTables)])
def test_the_deployment_decides_the_implementation(connectors: str, kind: type) -> None:
    settings = ClientSettings.model_validate({"CLINICAL_SPARK_CONNECTORS": connectors})
    assert isinstance(spark_tables(InMemoryTableStore(), settings), kind)


@pytest.mark.integration
def test_a_closed_or_lost_session_is_replaced(spark_env: dict[str, str]) -> None:
    sessions = SparkSessions(client_settings(spark_env))
    first = sessions.get()
    assert sessions.get() is first
    first.client.release_session()  # what a restart of the server does to it
    second = sessions.get()
    assert second is not first
    assert second.range(3).count() == 3
    sessions.close()
