"""Bronze to silver on Spark: accepted, duplicate or quarantined, and the same whatever is repeated or killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clinical_orchestration.ingestion import silver as silver_module
from clinical_orchestration.ingestion.accounting import account_for
from clinical_orchestration.ingestion.files import ingest_files
from clinical_orchestration.ingestion.silver import decode_increment, refine
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.spark import ArrowSparkTables, DeltaSparkTables, SparkSessions, SparkTables
from clinical_orchestration.stores.tables import COMMIT_VERSION, DeltaTableStore
from clinical_orchestration.tables import DUPLICATES, QUARANTINE, bronze, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import NOW, bronze_messages, sdtm_rows, vitals_message, write_sdtm
from clinical_orchestration_tests.fakes import InMemoryTableStore

PROFILES = {name: load_trial(name) for name in ("cdisc-pilot", "simulated")}
DOMAIN = "patient_vitals"
MEASUREMENTS = 5  # silver rows of one vitals message

FIRST = bronze_messages(
    [
        vitals_message(0),
        vitals_message(1),
        vitals_message(0),  # 2: says the same again
        vitals_message(1, heart_rate=99),  # 3: says something else about the same observation
        "{broken",
        vitals_message(2, heart_rate=400, spo2=10),
    ]
)
SECOND = bronze_messages([vitals_message(1), vitals_message(3), vitals_message(0, spo2=91)], start=6)

ALL = {
    "accepted": {"0", "1", "7"},
    "duplicates": {("2", "0"), ("6", "1")},
    "quarantined": {"3": ["conflicting_record"], "4": ["broken_json"], "5": None, "8": ["conflicting_record"]},
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class KilledAfter(DeltaSparkTables):
    """Dies after the given number of writes (0: before the first)."""

    writes = 99

    def append(self, name: str, *args: Any, **more: Any) -> int | None:
        if self.writes == 0:
            raise Killed
        self.writes -= 1
        return super().append(name, *args, **more)


@pytest.fixture(scope="module")
def sessions(spark_env: dict[str, str]) -> Iterator[SparkSessions]:
    sessions = SparkSessions(ClientSettings.model_validate(spark_env))
    yield sessions
    sessions.close()


@pytest.fixture
def store(tmp_path: Path) -> DeltaTableStore:
    return DeltaTableStore(str(tmp_path / "lake"))


def number(position: str) -> str:
    return position.rpartition("-")[2]


def outcome(store: DeltaTableStore) -> dict[str, Any]:
    """Return where every record is, by offset."""
    quarantined = store.read(QUARANTINE).to_pylist()
    duplicates = store.read(DUPLICATES).to_pylist()
    accepted = [number(position) for position in store.read(silver(DOMAIN)).column("source_position").to_pylist()]
    assert len(accepted) == MEASUREMENTS * len(set(accepted))
    assert len(quarantined) == len({row["source_position"] for row in quarantined})
    assert len(duplicates) == len({row["source_position"] for row in duplicates})
    return {
        "accepted": set(accepted),
        "duplicates": {(number(row["source_position"]), number(row["duplicate_of"])) for row in duplicates},
        "quarantined": {
            number(row["source_position"]): sorted({reason.partition(":")[0] for reason in row["reasons"]})
            for row in quarantined
        },
    }


def assert_final(store: DeltaTableStore) -> None:
    found = outcome(store)
    assert found["accepted"] == ALL["accepted"]
    assert found["duplicates"] == ALL["duplicates"]
    assert set(found["quarantined"]) == set(ALL["quarantined"])
    for offset in ("3", "8"):
        assert found["quarantined"][offset] == ["conflicting_record"]
    account = account_for(store, [DOMAIN])[DOMAIN]
    assert account.balanced, account.metadata()
    assert (account.bronze, account.accepted, account.duplicates, account.quarantined) == (9, 3, 2, 4)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["spark", "small_by_arrow", "arrow"])
def test_every_record_ends_in_one_place(kind: str, sessions: SparkSessions, store: DeltaTableStore) -> None:
    tables: SparkTables = (
        ArrowSparkTables(sessions, store)
        if kind == "arrow"
        else DeltaSparkTables(sessions, store, arrow_rows=0 if kind == "spark" else 1000)
    )
    store.append(bronze(DOMAIN), FIRST)
    report = refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).domains[DOMAIN]
    assert (report.received, report.accepted, report.duplicates, report.quarantined) == (6, 2, 1, 3)
    assert report.rows == store.row_count(silver(DOMAIN)) == 2 * MEASUREMENTS
    assert report.reasons["conflicting_record"] == 1
    store.append(bronze(DOMAIN), SECOND)
    report = refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).domains[DOMAIN]
    assert (report.received, report.accepted, report.duplicates, report.quarantined) == (3, 1, 1, 1)
    assert_final(store)
    by_offset = {number(row["source_position"]): row for row in store.read(QUARANTINE).to_pylist()}
    conflict = by_offset["8"]
    assert conflict["payload"] == SECOND.column("payload")[2].as_py()
    assert (conflict["table"], conflict["trial"], conflict["quarantined_at"]) == (DOMAIN, "simulated", NOW)
    assert "patient-vitals-0-0" in conflict["reasons"][0]
    assert len(by_offset["5"]["reasons"]) == 2  # all that is wrong, not the first only
    assert by_offset["4"]["payload"] == "{broken"


@pytest.mark.integration
def test_nothing_new_runs_no_spark(sessions: SparkSessions, store: DeltaTableStore) -> None:
    store.append(bronze(DOMAIN), FIRST.slice(0, 1))
    store.append(bronze(DOMAIN), FIRST.slice(1, 1))
    refine(DeltaSparkTables(sessions, store), store, PROFILES, domains=[DOMAIN], now=NOW)
    before = outcome(store)

    class NoSpark(SparkSessions):
        def get(self) -> Any:
            raise AssertionError("a Spark session was asked for")

    without = DeltaSparkTables(NoSpark(), store)
    report = refine(without, store, PROFILES, now=NOW)
    assert report.no_new_data
    assert report.total("received") == 0
    # compaction makes versions, but no data
    store.maintain(bronze(DOMAIN), min_small_files=1)
    assert refine(without, store, PROFILES, now=NOW).no_new_data
    assert store.transaction_version(silver(DOMAIN), bronze(DOMAIN)) == store.version(bronze(DOMAIN))
    assert outcome(store) == before


@pytest.mark.integration
@pytest.mark.parametrize("writes", [1, 2])
def test_a_killed_refine_leaves_nothing_twice_and_loses_nothing(
    writes: int, sessions: SparkSessions, store: DeltaTableStore
) -> None:
    tables = KilledAfter(sessions, store)
    tables.writes = writes
    store.append(bronze(DOMAIN), FIRST)
    with pytest.raises(Killed):
        refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW)
    assert store.row_count(silver(DOMAIN)) == 0
    # more arrives before the retry, which then covers both
    store.append(bronze(DOMAIN), SECOND)
    tables.writes = 99
    report = refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).domains[DOMAIN]
    assert report.received == 9
    assert_final(store)


@pytest.mark.integration
def test_lost_versions_are_made_up_for_by_reading_all(sessions: SparkSessions, store: DeltaTableStore) -> None:
    tables = DeltaSparkTables(sessions, store)
    store.append(bronze(DOMAIN), FIRST)
    refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW)
    for offset in range(SECOND.num_rows):
        store.append(bronze(DOMAIN), SECOND.slice(offset, 1))
    # what the versions consist of is compacted and removed before silver has read it
    assert store.maintain(bronze(DOMAIN), min_small_files=1, retention_hours=0).vacuumed > 0
    report = refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).domains[DOMAIN]
    assert (report.received, report.accepted, report.duplicates, report.quarantined) == (3, 1, 1, 1)
    assert_final(store)


@pytest.mark.integration
def test_the_same_data_under_another_name_and_format_gives_duplicates_only(
    sessions: SparkSessions, store: DeltaTableStore, tmp_path: Path
) -> None:
    tables, pilot, rows = DeltaSparkTables(sessions, store), PROFILES["cdisc-pilot"], sdtm_rows("VS", 6)
    write_sdtm(tmp_path / "a", "VS", rows)
    ingest_files(store, pilot, tmp_path / "a", now=NOW)
    refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW)
    accepted = store.read(silver(DOMAIN))
    assert accepted.num_rows == 6
    # the same file again
    ingest_files(store, pilot, tmp_path / "a", now=NOW)
    assert refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).no_new_data
    # the same rows in another format, one of them changed, and for another trial
    write_sdtm(tmp_path / "b", "VS", [*rows[:5], rows[5] | {"VSSTRESN": 111, "VSORRES": "111"}], "parquet")
    ingest_files(store, pilot, tmp_path / "b", now=NOW)
    ingest_files(store, PROFILES["simulated"], tmp_path / "b", now=NOW)
    report = refine(tables, store, PROFILES, domains=[DOMAIN], now=NOW).domains[DOMAIN]
    assert (report.accepted, report.duplicates, report.quarantined) == (6, 5, 1)
    assert report.reasons == {"conflicting_record": 1}
    now = store.read(silver(DOMAIN), filters=[("trial", "=", "cdisc-pilot")])
    assert now.sort_by("source_position") == accepted.sort_by("source_position")
    assert account_for(store, [DOMAIN])[DOMAIN].balanced


def bronze_batch(rows: pa.Table, version: int = 3) -> pa.RecordBatch:
    rows = rows.append_column(COMMIT_VERSION, pa.array([version] * rows.num_rows, pa.int64()))
    return rows.combine_chunks().to_batches()[0]


def test_the_decoder_counts_the_rows_of_each_record_once() -> None:
    decoded = decode_increment(DOMAIN, bronze_batch(FIRST), PROFILES)
    sizes = [size for size in decoded.column("_rows").to_pylist() if size]
    assert sizes == [5, 5, 5, 5, 1, 1]
    assert sum(sizes) == decoded.num_rows
    assert set(decoded.column(COMMIT_VERSION).to_pylist()) == {3}


def test_the_decoder_gives_its_columns_for_no_rows() -> None:
    batch = bronze_batch(FIRST).slice(0, 0)
    decoded = decode_increment(DOMAIN, batch, PROFILES)
    assert decoded.num_rows == 0
    assert decoded.schema.names == list(silver_module._decoded_columns(DOMAIN))


def test_without_bronze_nothing_is_new() -> None:
    store = InMemoryTableStore()
    report = refine(DeltaSparkTables(SparkSessions(), store), store, PROFILES, now=NOW)
    assert report.no_new_data
    assert report.total("received") == 0
    assert store.exists(QUARANTINE)


def test_records_that_silver_has_not_reached_are_no_violation() -> None:
    store = InMemoryTableStore()
    accounts: Mapping[str, Any] = account_for(store)
    assert all(account.balanced for account in accounts.values())
    store.append(bronze(DOMAIN), FIRST)
    violations = account_for(store, [DOMAIN])[DOMAIN].violations
    assert [(violation.kind, violation.count) for violation in violations] == [("missing", 6)]
