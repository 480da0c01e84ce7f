"""The pooled storage, with the stock one as the oracle: each reads what the other wrote, and they write the same."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dagster import (
    AssetCheckKey,
    AssetCheckResult,
    AssetKey,
    AssetSpec,
    DagsterInstance,
    DagsterRunStatus,
    Definitions,
    MaterializeResult,
    asset,
    asset_check,
    define_asset_job,
    multi_asset,
)
from dagster._core.test_utils import instance_for_test

from clinical_orchestration.execution import storage as pooled
from clinical_orchestration.platform import pooling
from clinical_orchestration_tests.databases import execute, temporary_database


@asset(tags={"a": "1"})
def first() -> MaterializeResult[None]:
    """An asset."""
    return MaterializeResult(metadata={"rows": 3})


@multi_asset(specs=[AssetSpec("left", deps=[first]), AssetSpec("right", deps=[first])])
def both() -> Iterator[MaterializeResult[None]]:
    """Two assets of a step."""
    yield MaterializeResult(asset_key="left")
    yield MaterializeResult(asset_key="right")


@asset_check(asset=first)
def is_right() -> AssetCheckResult:
    """A check."""
    return AssetCheckResult(passed=True, metadata={"n": 1})


@asset_check(asset="left")
def is_left() -> AssetCheckResult:
    """A check that does not pass."""
    return AssetCheckResult(passed=False)


DEFINITIONS = Definitions(
    assets=[first, both], asset_checks=[is_right, is_left], jobs=[define_asset_job("everything", "*")]
)


@dataclass
class Statements:
    """What is sent to the database."""

    texts: list[str]

    def of(self, word: str) -> int:
        """Return how many contain a word."""
        return sum(word in text for text in self.texts)


@pytest.fixture
def database(postgres_env: dict[str, str]) -> Iterator[str]:
    """An empty database."""
    with temporary_database(postgres_env["POSTGRES_URL"], "storage") as url:
        yield url
        pooled.shared_engine(url).dispose()


@pytest.fixture
def instances(database: str, tmp_path: Path) -> Iterator[dict[str, DagsterInstance]]:
    """Instances on one database, with the pooled and with the stock storage."""
    ours = {
        "custom": {
            "module": pooled.__name__, "class": "PooledPostgresStorage", "config": {"postgres_url": database},
        }
    }  # fmt: skip
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(instance_for_test(temp_dir=_made(tmp_path / name), overrides={"storage": chosen}))
            for name, chosen in (("pooled", ours), ("stock", {"postgres": {"postgres_url": database}}))
        }


def _made(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


@pytest.fixture
def statements(database: str) -> Iterator[Statements]:
    """What the pooled storage sends to the database."""
    seen = Statements([])

    def note(_: Any, __: Any, text: str, *___: Any) -> None:
        seen.texts.append(text)

    engine = pooled.shared_engine(database)
    sa.event.listen(engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", note)


def _run(instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch, *, batch: int = 0) -> str:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", str(batch))
    result = DEFINITIONS.resolve_job_def("everything").execute_in_process(instance=instance, raise_on_error=True)
    return result.run_id


def _rows(instance: DagsterInstance, run_id: str) -> dict[str, Any]:
    """Everything of a run that tells one storage's rows from another's, without ids and times."""
    events = instance.all_logs(run_id)
    checks = instance.event_log_storage
    found: dict[str, Any] = {
        "events": [
            (event.dagster_event_type.value if event.dagster_event_type else None, event.step_key)
            for event in events
            if event.is_dagster_event
        ],
        "status": instance.get_run_by_id(run_id).status,  # type: ignore[union-attr]
    }
    for key in ("first", "left", "right"):
        [record] = checks.get_asset_records([AssetKey(key)])
        entry = record.asset_entry
        assert entry.last_materialization_record is not None
        found[key] = (entry.last_run_id == run_id, entry.last_materialization_record.run_id == run_id)
    for key, name in (("first", "is_right"), ("left", "is_left")):
        history = checks.get_asset_check_execution_history(AssetCheckKey(AssetKey(key), name), limit=5)
        found[f"{key}:{name}"] = [record.status.value for record in history if record.run_id == run_id]
    found["tags"] = sorted(instance.event_log_storage.get_event_tags_for_asset(AssetKey("first"))[0])
    return found


@pytest.mark.parametrize("batch", [0, 100])
def test_both_storages_keep_the_same(
    instances: dict[str, DagsterInstance], monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    written = {name: _run(instance, monkeypatch, batch=batch) for name, instance in instances.items()}
    # whoever ran last is the last of every asset: run ours again, so that each is looked at when it is
    stock = _rows(instances["stock"], written["stock"])
    mine = _run(instances["pooled"], monkeypatch, batch=batch)
    assert _rows(instances["pooled"], mine) == stock
    assert _rows(instances["stock"], mine) == stock, "the stock storage reads what the pooled one wrote"
    assert stock["status"] is DagsterRunStatus.SUCCESS
    assert stock["first:is_right"] == ["SUCCEEDED"]
    assert stock["left:is_left"] == ["FAILED"]
    assert stock["tags"] == ["dagster/data_version"]


def test_rows_are_equal_column_by_column(
    instances: dict[str, DagsterInstance], monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """Of every table of the event log, without what differs between any two runs."""
    columns = {
        "event_logs": "dagster_event_type, step_key, asset_key, partition, length(event) > 0",
        "asset_event_tags": "asset_key, key",  # a data version is new in each run
        "asset_check_executions": "asset_key, check_name, partition, execution_status, evaluation_event IS NULL, "
        "evaluation_event_storage_id IS NULL, materialization_event_storage_id IS NULL",
    }
    engine = sa.create_engine(database)
    found = {}
    for name in ("stock", "pooled"):
        run_id = _run(instances[name], monkeypatch, batch=50)
        with engine.connect() as connection:
            for table, wanted in columns.items():
                by_run = "run_id = :run" if table != "asset_event_tags" else (
                    "event_id IN (SELECT id FROM event_logs WHERE run_id = :run)"
                )  # fmt: skip
                query = f"SELECT {wanted} FROM {table} WHERE {by_run}"  # noqa: S608  # of this test's own words
                rows = connection.execute(sa.text(query), {"run": run_id})
                found[name, table] = sorted(map(repr, rows))
    engine.dispose()
    for table in columns:
        assert found["stock", table], table
        assert found["stock", table] == found["pooled", table], table


def test_the_catalogue_is_asked_once(
    instances: dict[str, DagsterInstance], monkeypatch: pytest.MonkeyPatch, statements: Statements
) -> None:
    _run(instances["pooled"], monkeypatch)
    assert statements.of("pg_catalog")
    statements.texts.clear()
    _run(instances["pooled"], monkeypatch)
    assert len(statements.texts) > 20
    assert statements.of("pg_catalog") == 0


def test_a_missing_column_is_asked_for_again(instances: dict[str, DagsterInstance], statements: Statements) -> None:
    storage = instances["pooled"].event_log_storage
    assert storage.has_table("not_there_yet") is False  # type: ignore[attr-defined]
    with pooled.shared_engine(_url(instances)).begin() as connection:
        connection.execute(sa.text("CREATE TABLE not_there_yet (a int)"))
    assert storage.has_table("not_there_yet") is True  # type: ignore[attr-defined]
    statements.texts.clear()
    assert storage.has_table("not_there_yet") is True  # type: ignore[attr-defined]
    assert statements.texts == []


def _url(instances: dict[str, DagsterInstance]) -> str:
    return instances["pooled"].event_log_storage.postgres_url  # type: ignore[attr-defined, no-any-return]


def test_planned_events_of_a_run_are_one_insert(
    instances: dict[str, DagsterInstance], monkeypatch: pytest.MonkeyPatch, statements: Statements
) -> None:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "100")
    job = DEFINITIONS.resolve_job_def("everything")
    instances["pooled"].create_run_for_job(job)
    statements.texts.clear()
    run = instances["pooled"].create_run_for_job(job)
    assert statements.of("INSERT INTO event_logs") == 1
    assert statements.of("INSERT INTO asset_keys") == 1
    assert statements.of("INSERT INTO asset_check_executions") == 1
    planned = [event.event_type_value for event in _dagster_events(instances["stock"], run.run_id)]
    assert sorted(planned) == [
        "ASSET_CHECK_EVALUATION_PLANNED", "ASSET_CHECK_EVALUATION_PLANNED",
        "ASSET_MATERIALIZATION_PLANNED", "ASSET_MATERIALIZATION_PLANNED", "ASSET_MATERIALIZATION_PLANNED",
    ]  # fmt: skip


def _dagster_events(instance: DagsterInstance, run_id: str) -> list[Any]:
    return [log.dagster_event for log in instance.all_logs(run_id) if log.dagster_event]


@pytest.mark.parametrize("proven_seconds", [0.0, 60.0])  # as if it had been idle; as if it was used just now
def test_a_broken_connection_is_replaced_unseen(
    instances: dict[str, DagsterInstance], database: str, monkeypatch: pytest.MonkeyPatch, proven_seconds: float
) -> None:
    instance = instances["pooled"]
    assert instance.get_runs_count() == 0
    assert pooled.shared_engine(database).pool.checkedin() >= 1  # type: ignore[attr-defined]
    execute(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    time.sleep(0.1)  # the server says farewell
    monkeypatch.setattr(pooling, "PROVEN_SECONDS", proven_seconds)
    assert instance.get_runs_count() == 0


def _count_in_child(url: str, answer: Any) -> None:
    engine = pooled.shared_engine(url)
    with engine.connect() as connection:
        answer.put((os.getpid(), connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()))


def test_a_forked_child_opens_connections_of_its_own(database: str) -> None:
    engine = pooled.shared_engine(database)
    with engine.connect() as connection:
        mine = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    forks = multiprocessing.get_context("fork")
    answer = forks.Queue()
    child = forks.Process(target=_count_in_child, args=(database, answer))
    child.start()
    _, theirs = answer.get(timeout=30)
    child.join(30)
    assert theirs != mine
    with engine.connect() as connection:  # the parent's connection is neither closed nor used by the child
        assert connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() == mine
    engine.dispose()


def test_a_process_keeps_few_connections(instances: dict[str, DagsterInstance], database: str) -> None:
    for _ in range(5):
        instances["pooled"].get_runs_count()
        instances["pooled"].all_asset_keys()
        instances["pooled"].all_instigator_state()
    assert pooled.shared_engine(database).pool.checkedin() <= pooled.KEPT_CONNECTIONS  # type: ignore[attr-defined]


def test_the_web_server_limits_its_statements(instances: dict[str, DagsterInstance], database: str) -> None:
    instances["pooled"].optimize_for_webserver(statement_timeout=200, pool_recycle=60, max_overflow=2)
    with (
        pooled.shared_engine(database).connect() as connection,
        pytest.raises(sa.exc.OperationalError, match="statement timeout"),
    ):
        connection.execute(sa.text("SELECT pg_sleep(3)"))
