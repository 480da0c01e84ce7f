"""In-memory twins of the stores, with the semantics that the contract suites prove on the real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clinical_orchestration.alerts.model import Alert
from clinical_orchestration.stores.objects import ObjectNotFoundError, StoredObject
from clinical_orchestration.stores.tables import (
    COMMIT_VERSION,
    Maintenance,
    already_recorded,
    check_expected,
    conform,
    known_schema,
)

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class _Version:
    rows: pa.Table
    appended: pa.Table | None  # None where the commit was no append
    commit: dict[str, Any]


@dataclass
class _Table:
    versions: list[_Version] = field(default_factory=list)
    transactions: dict[str, int] = field(default_factory=dict)


class InMemoryTableStore:
    """A :class:`clinical_orchestration.stores.tables.TableStore` held in memory."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}
        self._lock = threading.RLock()

    def uri(self, name: str) -> str:
        return f"memory://{id(self)}/{name}"  # two stores are two places

    def exists(self, name: str) -> bool:
        return name in self._tables

    def ensure(self, name: str, *, schema: pa.Schema | None = None, partition_by: Sequence[str] | None = None) -> int:
        if not self.exists(name):
            schema = known_schema(name) if schema is None else schema
            if schema is None:
                raise KeyError(f"table {name} is absent and tables.py does not describe it")
            self._create(name, schema)
        return len(self._tables[name].versions) - 1

    def version(self, name: str) -> int | None:
        return len(self._tables[name].versions) - 1 if self.exists(name) else None

    def read(
        self,
        name: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Any = None,
        version: int | None = None,
    ) -> pa.Table:
        import pyarrow.parquet as pq

        if self.exists(name):
            rows = self._tables[name].versions[-1 if version is None else version].rows
        else:
            schema = known_schema(name)
            if schema is None:
                raise KeyError(f"table {name} is absent and tables.py does not describe it")
            rows = schema.empty_table()
        if filters is not None:
            rows = rows.filter(pq.filters_to_expression(filters))
        return rows if columns is None else rows.select(list(columns))

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, columns: Sequence[str] | None = None
    ) -> pa.Table:
        import pyarrow as pa

        if not self.exists(name):
            raise KeyError(f"table {name} is absent")
        versions = self._tables[name].versions
        schema = versions[-1].rows.schema
        parts = []
        for number in range(from_version_exclusive + 1, to_version + 1):
            appended = versions[number].appended
            if appended is not None:
                rows = conform(appended, schema)
                commits = pa.array([number] * rows.num_rows, pa.int64())
                parts.append(rows.append_column(COMMIT_VERSION, commits))
        empty = schema.append(pa.field(COMMIT_VERSION, pa.int64())).empty_table()
        found = pa.concat_tables([empty, *parts])
        return found if columns is None else found.select([*columns, COMMIT_VERSION])

    def append(
        self,
        name: str,
        data: pa.Table,
        *,
        transactions: Mapping[str, int] | None = None,
        expected: Mapping[str, int | None] | None = None,
        partition_by: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int | None:
        import pyarrow as pa

        with self._lock:
            recorded: dict[str, int | None] = {app: self.transaction_version(name, app) for app in transactions or {}}
            if transactions and already_recorded(transactions, recorded, {**recorded, **(expected or {})}):
                return None
            if not self.exists(name):
                schema = known_schema(name)
                self._create(name, conform(data, schema).schema if schema is not None else data.schema)
            table = self._tables[name]
            rows = conform(data, table.versions[-1].rows.schema)
            merged = pa.concat_tables([conform(table.versions[-1].rows, rows.schema), rows])
            self._commit(table, merged, rows, "WRITE", metadata)
            table.transactions.update(transactions or {})
            return len(table.versions) - 1

    def replace(
        self,
        name: str,
        data: pa.Table,
        *,
        predicate: str | None = None,
        partition_by: Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        transactions: Mapping[str, int] | None = None,
        expected: Mapping[str, int | None] | None = None,
    ) -> int:
        import polars as pl
        import pyarrow as pa

        with self._lock:
            schema = known_schema(name)
            if not self.exists(name):
                self._create(name, conform(data, schema).schema if schema is not None else data.schema)
            table = self._tables[name]
            check_expected(expected, table.transactions.get)
            if predicate is None:
                rows = data if schema is None else conform(data, schema)
                self._commit(table, rows, None, "WRITE", metadata)
                table.transactions.update(transactions or {})
                return len(table.versions) - 1
            current = table.versions[-1].rows
            rows = conform(data, current.schema)

            def matches(of: pa.Table) -> pa.Array:
                frame = pl.from_arrow(of)
                assert isinstance(frame, pl.DataFrame)
                return pa.array(frame.select(pl.sql_expr(predicate).fill_null(False)).to_series().to_list(), pa.bool_())

            if not all(matches(rows).to_pylist()):
                raise ValueError(f"a row for {name} does not match the predicate {predicate!r}")
            import pyarrow.compute as pc

            kept = current.filter(pc.invert(matches(current)))
            self._commit(table, pa.concat_tables([conform(kept, rows.schema), rows]), None, "WRITE", metadata)
            table.transactions.update(transactions or {})
            return len(table.versions) - 1

    def transaction_version(self, name: str, app_id: str) -> int | None:
        return self._tables[name].transactions.get(app_id) if self.exists(name) else None

    def row_count(self, name: str) -> int:
        return int(self._tables[name].versions[-1].rows.num_rows) if self.exists(name) else 0

    def history(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        if not self.exists(name):
            return []
        return [version.commit for version in reversed(self._tables[name].versions)][:limit]

    def maintain(self, name: str, *, min_small_files: int = 16, retention_hours: int = 168) -> Maintenance:
        return Maintenance(1, 1, 0)

    def _create(self, name: str, schema: pa.Schema) -> None:
        self._tables[name] = _Table()
        self._commit(self._tables[name], schema.empty_table(), None, "CREATE TABLE", None)

    def _commit(
        self,
        table: _Table,
        rows: pa.Table,
        appended: pa.Table | None,
        operation: str,
        metadata: Mapping[str, str] | None,
    ) -> None:
        commit = {
            **(metadata or {}),
            "version": len(table.versions),
            "timestamp": int(time.time() * 1000),
            "operation": operation,
        }
        table.versions.append(_Version(rows, appended, commit))


class RecordingNotifier:
    """A :class:`clinical_orchestration.alerts.model.Notifier` that keeps what it was told, in order."""

    def __init__(self) -> None:
        self.sent: list[Alert] = []
        self.resolved: list[str] = []

    def send(self, alert: Alert) -> bool:
        self.sent.append(alert)
        return True

    def resolve(self, key: str, note: str = "") -> bool:
        self.resolved.append(key)
        return any(alert.key == key for alert in self.sent)


class InMemoryObjects:
    """:class:`clinical_orchestration.stores.objects.Objects` in a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def uri(self, key: str) -> str:
        return f"s3://memory/{key}"

    def ensure_bucket(self) -> bool:
        return False

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        self.objects[key] = data
        return self.uri(key)

    def get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectNotFoundError(key) from None

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield StoredObject(key, len(self.objects[key]), None)
