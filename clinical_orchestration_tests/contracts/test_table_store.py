"""One suite for every TableStore: in memory, Delta on a local folder, Delta on S3."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest

from clinical_orchestration import tables as names
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.tables import (
    DeltaTableStore,
    TableStore,
    TransactionMovedError,
    known_schema,
    storage_options,
)
from clinical_orchestration_tests.fakes import InMemoryTableStore

VITALS = names.bronze("patient_vitals")


@pytest.fixture(params=["memory", "folder", pytest.param("s3", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TableStore]:
    if request.param == "memory":
        yield InMemoryTableStore()
    elif request.param == "folder":
        yield DeltaTableStore(str(tmp_path / "lake"))
    else:
        settings = ClientSettings.model_validate(request.getfixturevalue("s3_env"))
        yield DeltaTableStore(f"s3://clinical-mlops/{uuid4().hex}", storage_options(settings))


def bronze_rows(*positions: int) -> pa.Table:
    now = datetime(2025, 1, 1, tzinfo=UTC)
    return pa.table(
        {
            "source": ["kafka:patient-vitals"] * len(positions),
            "source_position": pa.array([f"patient-vitals-0-{p}" for p in positions], pa.string()),
            "ingested_at": pa.array([now] * len(positions), pa.timestamp("us", tz="UTC")),
            "payload": pa.array(["{}"] * len(positions), pa.string()),
        }
    )


def positions(store: TableStore, name: str = VITALS) -> list[str]:
    return sorted(store.read(name, columns=["source_position"]).column(0).to_pylist())


def test_an_absent_known_table_reads_empty_with_its_columns(store: TableStore) -> None:
    assert not store.exists(VITALS)
    assert store.version(VITALS) is None
    assert store.row_count(VITALS) == 0
    assert store.transaction_version(VITALS, "any") is None
    assert store.history(VITALS) == []
    assert store.read(VITALS).schema == known_schema(VITALS)
    assert store.read(VITALS, columns=["payload"]).column_names == ["payload"]


def test_an_absent_unknown_table_is_a_key_error(store: TableStore) -> None:
    with pytest.raises(KeyError, match="gold/no_such_table"):
        store.read("gold/no_such_table")
    with pytest.raises(KeyError):
        store.ensure("gold/no_such_table")


def test_ensure_creates_once(store: TableStore) -> None:
    assert store.ensure(names.QUARANTINE) == 0
    assert store.ensure(names.QUARANTINE) == 0
    assert store.exists(names.QUARANTINE)
    assert store.read(names.QUARANTINE).schema == known_schema(names.QUARANTINE)


def test_append_fills_missing_columns_with_null_and_keeps_types(store: TableStore) -> None:
    version = store.append(VITALS, bronze_rows(1, 2), metadata={"clinical.run": "r1"})
    assert version == store.version(VITALS)
    rows = store.read(VITALS)
    assert rows.schema == known_schema(VITALS)
    assert rows.column("received_at").null_count == 2
    assert store.row_count(VITALS) == 2
    assert store.history(VITALS, 1)[0]["clinical.run"] == "r1"


def test_old_versions_stay_readable(store: TableStore) -> None:
    first = store.append(VITALS, bronze_rows(1))
    store.append(VITALS, bronze_rows(2))
    assert store.read(VITALS, version=first).num_rows == 1
    assert store.read(VITALS).num_rows == 2


def test_filters_and_columns_select(store: TableStore) -> None:
    store.append(VITALS, bronze_rows(1, 2, 3))
    found = store.read(VITALS, columns=["payload"], filters=[("source_position", "=", "patient-vitals-0-2")])
    assert found.num_rows == 1
    assert found.column_names == ["payload"]


def test_a_recorded_transaction_is_not_appended_again(store: TableStore) -> None:
    assert store.append(VITALS, bronze_rows(0, 1), transactions={"kafka:t:0": 2}) is not None
    assert store.append(VITALS, bronze_rows(0, 1), transactions={"kafka:t:0": 2}) is None
    assert store.append(VITALS, bronze_rows(0), transactions={"kafka:t:0": 1}) is None
    assert store.append(VITALS, bronze_rows(2), transactions={"kafka:t:0": 3}, expected={"kafka:t:0": 2}) is not None
    assert store.transaction_version(VITALS, "kafka:t:0") == 3
    assert positions(store) == [f"patient-vitals-0-{p}" for p in (0, 1, 2)]


def test_partly_recorded_or_unexpected_transactions_are_refused(store: TableStore) -> None:
    store.append(VITALS, bronze_rows(0), transactions={"p0": 1})
    with pytest.raises(TransactionMovedError):
        store.append(VITALS, bronze_rows(0, 5), transactions={"p0": 1, "p1": 5})
    with pytest.raises(TransactionMovedError):
        store.append(VITALS, bronze_rows(0, 1), transactions={"p0": 2}, expected={"p0": None})
    assert store.row_count(VITALS) == 1


def test_transactions_are_recorded_without_rows(store: TableStore) -> None:
    assert store.append(VITALS, bronze_rows(), transactions={"p0": 7}) is not None
    assert store.transaction_version(VITALS, "p0") == 7
    assert store.row_count(VITALS) == 0


def test_read_appended_gives_the_increment_with_its_versions(store: TableStore) -> None:
    start = store.ensure(VITALS)
    first = store.append(VITALS, bronze_rows(1))
    second = store.append(VITALS, bronze_rows(2, 3))
    assert first is not None
    assert second is not None
    rows = store.read_appended(VITALS, start, second, columns=["source_position"])
    found = sorted((row["_commit_version"], row["source_position"]) for row in rows.to_pylist())
    assert found == [(first, "patient-vitals-0-1"), (second, "patient-vitals-0-2"), (second, "patient-vitals-0-3")]
    assert store.read_appended(VITALS, first, second).num_rows == 2
    assert store.read_appended(VITALS, second, second).num_rows == 0


def test_new_columns_are_added_by_append(store: TableStore) -> None:
    def features(**values: float) -> pa.Table:
        return pa.table(
            {
                "trial": ["t"],
                "patient_id": ["p"],
                "feature_time": pa.array([datetime(2025, 1, 2, tzinfo=UTC)], pa.timestamp("us", tz="UTC")),
                "feature_date": pa.array([date(2025, 1, 2)]),
                **{name: pa.array([value], pa.float64()) for name, value in values.items()},
            }
        )

    store.append(names.FEATURES, features(a=1.0))
    store.append(names.FEATURES, features(b=2.0))
    rows = store.read(names.FEATURES).to_pylist()
    assert sorted((row["a"], row["b"]) for row in rows if row["a"]) == [(1.0, None)]
    assert sorted((row["a"], row["b"]) for row in rows if row["b"]) == [(None, 2.0)]


def test_replace_replaces_what_the_predicate_says_only(store: TableStore) -> None:
    def outcome(trial: str, value: float) -> pa.Table:
        return pa.table({"trial": [trial], "value": [value]})

    store.replace("gold/training_set", outcome("a", 1.0))
    store.append("gold/training_set", outcome("b", 2.0))
    store.replace("gold/training_set", outcome("a", 3.0), predicate="trial = 'a'", metadata={"clinical.why": "x"})
    rows = sorted((row["trial"], row["value"]) for row in store.read("gold/training_set").to_pylist())
    assert rows == [("a", 3.0), ("b", 2.0)]
    assert store.history("gold/training_set", 1)[0]["clinical.why"] == "x"
    with pytest.raises(ValueError, match="predicate"):
        store.replace("gold/training_set", outcome("b", 9.0), predicate="trial = 'a'")
    version = store.replace("gold/training_set", pa.table({"trial": ["c"], "other": [1]}))
    assert version == store.version("gold/training_set")
    assert store.read("gold/training_set").to_pylist() == [{"trial": "c", "other": 1}]


def test_an_empty_replacement_deletes_the_matching_rows(store: TableStore) -> None:
    rows = pa.table({"trial": ["a", "b"], "value": [1.0, 2.0]})
    store.append("gold/training_set", rows)
    store.replace("gold/training_set", rows.slice(0, 0), predicate="trial = 'a'")
    assert store.read("gold/training_set").to_pylist() == [{"trial": "b", "value": 2.0}]


def test_partitioned_tables_replace_by_partition(tmp_path: Path) -> None:
    store = DeltaTableStore(str(tmp_path))
    days = pa.table({"feature_date": [date(2025, 1, 1), date(2025, 1, 2)], "value": [1.0, 2.0]})
    store.append("gold/days", days, partition_by=["feature_date"])
    store.replace("gold/days", days.slice(0, 1), predicate="feature_date = DATE '2025-01-01'")
    assert store.read("gold/days").num_rows == 2
    assert (tmp_path / "gold/days/feature_date=2025-01-01").is_dir()


def test_compaction_keeps_rows_and_the_increment(tmp_path: Path) -> None:
    store = DeltaTableStore(str(tmp_path))
    start = store.ensure(VITALS)
    for number in range(6):
        store.append(VITALS, bronze_rows(number), transactions={"p0": number + 1})
    before = store.version(VITALS)
    assert store.maintain(VITALS, min_small_files=99).files_after == 6
    done = store.maintain(VITALS, min_small_files=2)
    assert (done.files_before, done.files_after) == (6, 1)
    assert len(positions(store)) == 6
    assert store.transaction_version(VITALS, "p0") == 6
    after = store.version(VITALS)
    assert before is not None
    assert after is not None
    assert after > before
    assert store.read_appended(VITALS, start, after).num_rows == 6
    assert store.read_appended(VITALS, before, after).num_rows == 0


WRITER = """
import sys
from clinical_orchestration.stores.tables import DeltaTableStore, TransactionMovedError, storage_options
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration_tests.contracts.test_table_store import VITALS, bronze_rows

root, total = sys.argv[1], int(sys.argv[2])
store = DeltaTableStore(root, storage_options(ClientSettings()) if root.startswith("s3") else None)
while (at := store.transaction_version(VITALS, "p0") or 0) < total:
    recorded = store.transaction_version(VITALS, "p0")
    start = recorded or 0
    end = min(total, start + 2)
    if start >= total:
        break
    try:
        store.append(VITALS, bronze_rows(*range(start, end)), transactions={"p0": end}, expected={"p0": recorded})
    except TransactionMovedError:
        pass
"""


def race(start: Callable[[], subprocess.Popen[Any]], writers: int = 3) -> None:
    running = [start() for _ in range(writers)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=pytest.mark.integration)])
def test_racing_processes_append_every_range_once(
    where: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "folder":
        store = DeltaTableStore(str(tmp_path))
    else:
        environment = request.getfixturevalue("s3_env")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)  # for the processes that are started
        store = DeltaTableStore(
            f"s3://clinical-mlops/{uuid4().hex}", storage_options(ClientSettings.model_validate(environment))
        )

    def start() -> subprocess.Popen[Any]:
        command = [sys.executable, "-c", WRITER, store.root, "24"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    race(start)
    assert positions(store) == sorted(f"patient-vitals-0-{p}" for p in range(24))


SAME_FILE = """
import sys
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration_tests.contracts.test_table_store import VITALS, bronze_rows

store = DeltaTableStore(sys.argv[1])
for number in range(8):
    store.append(VITALS, bronze_rows(number), transactions={f"file:{number}": 1})
"""


def test_racing_processes_ingest_the_same_file_once(tmp_path: Path) -> None:
    store = DeltaTableStore(str(tmp_path))

    def start() -> subprocess.Popen[Any]:
        command = [sys.executable, "-c", SAME_FILE, store.root]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    race(start)
    assert positions(store) == [f"patient-vitals-0-{p}" for p in range(8)]


def test_a_table_that_another_writer_creates_first_is_looked_at_again(tmp_path: Path) -> None:
    other = DeltaTableStore(str(tmp_path))

    class Late(DeltaTableStore):
        def _create(self, *args: Any) -> Any:
            other.append(VITALS, bronze_rows(0, 1), transactions={"p0": 2})
            return super()._create(*args)

    late = Late(str(tmp_path))
    assert late.append(VITALS, bronze_rows(0, 1), transactions={"p0": 2}) is None
    assert positions(other) == ["patient-vitals-0-0", "patient-vitals-0-1"]
