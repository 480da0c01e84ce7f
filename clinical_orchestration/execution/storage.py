"""Dagster's PostgreSQL storage over one small pool of connections.

The stock storage opens a connection for each statement outside the web server, asks PostgreSQL's catalogue before many
reads whether a column exists, and writes the events that announce a run's assets one at a time. Here the three parts of
the storage share a pool that survives forks and restarts of the database, an answer "it is there" is remembered, and a
batch of events is one statement a table. Tables and contents are those of `dagster-postgres`: either storage reads what
the other wrote, so that the stock one can be put back at any time (`storage: postgres:` in `dagster.yaml`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from dagster import DagsterEventType
from dagster._config.config_schema import UserConfigSchema
from dagster._core.events import ASSET_CHECK_EVENTS, ASSET_EVENTS
from dagster._core.events.log import EventLogEntry
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.config import pg_config
from dagster._core.storage.event_log import AssetKeyTable, SqlEventLogStorageTable
from dagster._core.storage.event_log.migration import ASSET_KEY_INDEX_COLS
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from dagster._serdes import ConfigurableClass, ConfigurableClassData, serialize_value
from dagster_postgres.event_log import PostgresEventLogStorage
from dagster_postgres.run_storage import PostgresRunStorage
from dagster_postgres.schedule_storage import PostgresScheduleStorage
from dagster_postgres.utils import pg_url_from_config, retry_pg_connection_fn
from sqlalchemy.dialects import postgresql

from clinical_orchestration.platform.pooling import prove_idle_connections

if TYPE_CHECKING:
    from dagster._core.storage.event_log import EventLogStorage
    from dagster._core.storage.runs import RunStorage
    from dagster._core.storage.schedules import ScheduleStorage
    from sqlalchemy.engine import Connection

KEPT_CONNECTIONS = 2
"""Connections that a process keeps open; more are opened when threads need them, and closed after their use."""

_KEPT_SNAPSHOTS = 64
_INSERT_EVENTS = SqlEventLogStorageTable.insert().returning(SqlEventLogStorageTable.c.id, sort_by_parameter_order=True)
_MAIN_TABLES = frozenset({"runs", "event_logs", "jobs", "instance_info"})
_engines: dict[str, sa.Engine] = {}
_lock = threading.Lock()


def shared_engine(postgres_url: str) -> sa.Engine:
    """Return this process's engine for a database: one for all storages, in autocommit mode as Dagster's are.

    A connection that died while it was idle is replaced without an error. A forked child starts with an empty pool and
    leaves the parent's connections alone.
    """
    with _lock:
        engine = _engines.get(postgres_url)
        if engine is None:
            engine = sa.create_engine(
                postgres_url,
                isolation_level="AUTOCOMMIT",
                pool_size=KEPT_CONNECTIONS,
                max_overflow=-1,  # a thread can need a second connection while it holds one: a limit could lock up
                pool_use_lifo=True,
            )
            prove_idle_connections(engine)
            _engines[postgres_url] = engine
    return engine


def _after_fork() -> None:
    global _lock  # a thread of the parent may have held it
    _lock = threading.Lock()
    for engine in _engines.values():
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_after_fork)


class _Remembering:
    """Remembers that a table, column or index is there. That it is not is asked again: a migration may make it."""

    def __init__(self) -> None:
        self._there: set[str] = set()

    def __call__(self, name: str, ask: Callable[[], bool]) -> bool:
        if name in self._there:
            return True
        if not ask():
            return False
        self._there.add(name)
        return True


def _limit_statements(engine: sa.Engine, milliseconds: int) -> None:

    def limit(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {int(milliseconds)}")

    sa.event.listen(engine, "connect", limit)
    engine.dispose()


class PooledRunStorage(PostgresRunStorage):
    """Dagster's run storage on a shared engine; it remembers the newest snapshots, which their contents name."""

    def __init__(self, postgres_url: str, engine: sa.Engine) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False)
        self._engine = engine
        self._is_there = _Remembering()
        self._snapshots: OrderedDict[str, Any] = OrderedDict()

    def _get_snapshot(self, snapshot_id: str) -> Any:
        found = self._snapshots.get(snapshot_id)
        if found is None and (found := super()._get_snapshot(snapshot_id)) is not None:
            self._snapshots[snapshot_id] = found
            while len(self._snapshots) > _KEPT_SNAPSHOTS:
                self._snapshots.pop(next(iter(self._snapshots)), None)
        return found

    def _has_snapshot_id(self, snapshot_id: str) -> bool:
        ask = super()._has_snapshot_id
        return self._is_there(f"snapshot {snapshot_id}", lambda: ask(snapshot_id))

    def wipe(self) -> None:
        """Delete every run; the snapshots go too."""
        super().wipe()
        self._snapshots.clear()
        self._is_there = _Remembering()

    def optimize_for_webserver(self, statement_timeout: int, pool_recycle: int, max_overflow: int) -> None:
        """Keep the pool, which all parts share; a statement of the web server may take no longer than it says."""
        _limit_statements(self._engine, statement_timeout)

    def has_run_stats_index_cols(self) -> bool:  # noqa: D102
        return self._is_there("run stats", super().has_run_stats_index_cols)

    def has_bulk_actions_selector_cols(self) -> bool:  # noqa: D102
        return self._is_there("bulk actions selector", super().has_bulk_actions_selector_cols)

    def has_backfill_id_column(self) -> bool:  # noqa: D102
        return self._is_there("backfill id", super().has_backfill_id_column)

    def has_bulk_action_job_name_column(self) -> bool:  # noqa: D102
        return self._is_there("bulk action job name", super().has_bulk_action_job_name_column)

    def has_backfill_tags_table(self) -> bool:  # noqa: D102
        return self._is_there("backfill tags", super().has_backfill_tags_table)


class PooledScheduleStorage(PostgresScheduleStorage):
    """Dagster's storage of schedules, sensors and ticks on a shared engine."""

    def __init__(self, postgres_url: str, engine: sa.Engine) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False)
        self._engine = engine
        self._is_there = _Remembering()

    def optimize_for_webserver(self, statement_timeout: int, pool_recycle: int, max_overflow: int) -> None:
        """Keep the pool, which all parts share."""

    def has_instigators_table(self) -> bool:  # noqa: D102
        return self._is_there("instigators", super().has_instigators_table)

    def _has_instigators_table(self, conn: Connection) -> bool:
        ask = super()._has_instigators_table
        return self._is_there("instigators", lambda: ask(conn))

    def _has_asset_daemon_asset_evaluations_table(self, conn: Connection) -> bool:
        ask = super()._has_asset_daemon_asset_evaluations_table
        return self._is_there("evaluations", lambda: ask(conn))

    def has_secondary_index_table(self) -> bool:  # noqa: D102
        return self._is_there("secondary indexes", super().has_secondary_index_table)

    def has_built_index(self, migration_name: str) -> bool:  # noqa: D102
        ask = super().has_built_index
        return self._is_there(f"index {migration_name}", lambda: ask(migration_name))


class PooledEventLogStorage(PostgresEventLogStorage):
    """Dagster's event log on a shared engine, with batches that are one statement a table."""

    def __init__(self, postgres_url: str, engine: sa.Engine) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False)
        self._engine = engine
        self._is_there = _Remembering()

    def optimize_for_webserver(self, statement_timeout: int, pool_recycle: int, max_overflow: int) -> None:
        """Keep the pool, which all parts share."""

    def has_table(self, table_name: str) -> bool:  # noqa: D102
        ask = super().has_table
        return self._is_there(f"table {table_name}", lambda: ask(table_name))

    def _has_asset_key_col_on_connection(self, conn: Connection, column_name: str) -> bool:
        ask = super()._has_asset_key_col_on_connection
        return self._is_there(f"asset key {column_name}", lambda: ask(conn, column_name))

    def has_asset_key_col(self, column_name: str) -> bool:  # noqa: D102
        ask = super().has_asset_key_col
        return self._is_there(f"asset key {column_name}", lambda: ask(column_name))

    def store_event(self, event: EventLogEntry) -> None:
        """Store an event of a run, then what the asset tables say of it.

        The stock storage also sends a NOTIFY, which Dagster itself has not listened to since it polls.
        """
        self._store([event])

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """Store events in their order, all of them or none, then what the asset tables say of them."""
        kept = [
            event
            for event in events
            if event.dagster_event is None or not event.dagster_event.is_asset_failed_to_materialize
        ]
        if kept:
            self._store(kept)

    def _store(self, events: Sequence[EventLogEntry]) -> None:
        about_assets = [
            event.is_dagster_event
            and event.dagster_event_type in ASSET_EVENTS
            and event.get_dagster_event().asset_key is not None
            for event in events
        ]
        about_checks = [event.is_dagster_event and event.dagster_event_type in ASSET_CHECK_EVENTS for event in events]
        # committed by itself, as the stock storage does: readers follow the ids, and one that is seen late is missed
        with self._connect() as conn:
            ids = [int(row[0]) for row in conn.execute(_INSERT_EVENTS, [self._event_to_row(event) for event in events])]
        if not any(about_assets) and not any(about_checks):
            return
        planned_checks = DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED
        of_assets = [(event, number) for event, number, wanted in zip(events, ids, about_assets, strict=True) if wanted]
        planned = [
            row
            for event, number in zip(events, ids, strict=True)
            if event.is_dagster_event and event.dagster_event_type is planned_checks
            for row in self._planned_check_rows(event, number)
        ]
        if of_assets or planned:
            with self.index_transaction() as conn:
                if of_assets:
                    self._store_asset_event_tags(
                        conn, [event for event, _ in of_assets], [number for _, number in of_assets]
                    )
                    self._store_asset_entries(conn, of_assets)
                if planned:
                    conn.execute(AssetCheckExecutionsTable.insert(), planned)
        for event, number, wanted in zip(events, ids, about_checks, strict=True):
            if wanted and event.dagster_event_type is not planned_checks:
                self.store_asset_check_event(event, number)

    def _store_asset_entries(self, conn: Connection, events: Sequence[tuple[EventLogEntry, int]]) -> None:
        """Note the last event of each asset; in the order of the keys, so that two writers cannot lock each other."""
        indexed = self.has_secondary_index(ASSET_KEY_INDEX_COLS)
        last: dict[str, dict[str, Any]] = {}
        for event, number in events:
            key = event.get_dagster_event().asset_key
            assert key is not None  # noqa: S101
            last.setdefault(key.to_string(), {}).update(self._get_asset_entry_values(event, number, indexed))
        shapes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for key_string, values in sorted(last.items()):
            shapes.setdefault(tuple(sorted(values)), []).append({"asset_key": key_string, **values})
        for columns, rows in shapes.items():
            insert = postgresql.insert(AssetKeyTable)
            if columns:
                insert = insert.on_conflict_do_update(
                    index_elements=[AssetKeyTable.c.asset_key],
                    set_={column: insert.excluded[column] for column in columns},
                )
            else:
                insert = insert.on_conflict_do_nothing()
            conn.execute(insert.returning(AssetKeyTable.c.asset_key), rows)  # with RETURNING it is one statement

    def _planned_check_rows(self, event: EventLogEntry, number: int) -> list[dict[str, Any]]:
        planned: Any = event.get_dagster_event().event_specific_data
        partitions = planned.partitions_subset.get_partition_keys() if planned.partitions_subset else [None]
        return [
            {
                "asset_key": planned.asset_key.to_string(),
                "check_name": planned.check_name,
                "partition": partition,
                "run_id": event.run_id,
                "execution_status": AssetCheckExecutionRecordStatus.PLANNED.value,
                "evaluation_event": serialize_value(event),
                "evaluation_event_timestamp": self._event_insert_timestamp(event),  # type: ignore[no-untyped-call]
                "evaluation_event_storage_id": number,
            }
            for partition in partitions
        ]


class PooledPostgresStorage(DagsterStorage, ConfigurableClass):
    """Dagster's storage in PostgreSQL over one pool of connections; the options are those of `dagster-postgres`.

    Args:
        postgres_url: where the database is.
        should_autocreate_tables: make the tables when they are missing.
        inst_data: what Dagster read it from.
    """

    def __init__(
        self,
        postgres_url: str,
        should_autocreate_tables: bool = True,
        inst_data: ConfigurableClassData | None = None,
    ) -> None:
        self.postgres_url = postgres_url
        self.should_autocreate_tables = should_autocreate_tables
        self._inst_data = inst_data
        self._engine = shared_engine(postgres_url)
        if should_autocreate_tables:
            tables = retry_pg_connection_fn(lambda: sa.inspect(self._engine).get_table_names())
            if not _MAIN_TABLES.issubset(tables):  # the stock storages make them, each its own
                for storage in (PostgresRunStorage, PostgresEventLogStorage, PostgresScheduleStorage):
                    storage(postgres_url, should_autocreate_tables=True)
        self._run_storage = PooledRunStorage(postgres_url, self._engine)
        self._event_log_storage = PooledEventLogStorage(postgres_url, self._engine)
        self._schedule_storage = PooledScheduleStorage(postgres_url, self._engine)
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """What Dagster read it from."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """Return the options: those of `dagster-postgres`."""
        return pg_config()

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> PooledPostgresStorage:
        """Make it from `dagster.yaml`."""
        return cls(
            inst_data=inst_data,
            postgres_url=pg_url_from_config(config_value),
            should_autocreate_tables=config_value.get("should_autocreate_tables", True),
        )

    @property
    def event_log_storage(self) -> EventLogStorage:
        """The events."""
        return self._event_log_storage

    @property
    def run_storage(self) -> RunStorage:
        """The runs."""
        return self._run_storage

    @property
    def schedule_storage(self) -> ScheduleStorage:
        """Schedules, sensors and their ticks."""
        return self._schedule_storage
