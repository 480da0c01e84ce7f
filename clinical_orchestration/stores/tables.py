"""Delta tables by name, read and written through Arrow: the store that everything but Spark uses.

:class:`TableStore` is the role; :class:`DeltaTableStore` fills it with delta-rs on a local folder or on S3. Names and
columns are those of :mod:`clinical_orchestration.tables`. Writers record their progress (Kafka offsets, ingested
files, processed versions) as Delta *app transactions* in the same commit as the rows, so that a killed or raced
writer neither repeats nor loses anything.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from clinical_orchestration import tables as names
from clinical_orchestration.settings import ClientSettings, lake_root

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import CommitProperties, DeltaTable

COMMIT_VERSION = "_commit_version"  # the column that read_appended adds

_ATTEMPTS = 12  # of a commit that other writers overtake; each attempt sees all commits made before it
_T = TypeVar("_T")


class TransactionMovedError(RuntimeError):
    """Another writer recorded part of what this append covers: read the recorded positions and prepare it again."""


@dataclass(frozen=True)
class Maintenance:
    """What :meth:`TableStore.maintain` did to one table."""

    files_before: int
    files_after: int
    vacuumed: int


class TableStore(Protocol):
    """Tables by name (``silver/lab_results``). Each write is one atomic version; versions count from 0."""

    def uri(self, name: str) -> str:
        """Return where the table is: a folder or an ``s3://`` address, for any Delta reader."""
        ...

    def exists(self, name: str) -> bool:
        """Return whether the table has been created."""
        ...

    def ensure(self, name: str, *, schema: pa.Schema | None = None, partition_by: Sequence[str] | None = None) -> int:
        """Create the table empty if it is absent; return its version.

        Args:
            name: the table.
            schema: its columns; default: those of ``tables.py``.
            partition_by: its partition columns; default: those that its name implies.

        Raises:
            KeyError: the table is absent and its columns are not known.
        """
        ...

    def version(self, name: str) -> int | None:
        """Return the newest version, None for an absent table."""
        ...

    def read(
        self,
        name: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Any = None,
        version: int | None = None,
    ) -> pa.Table:
        """Return the rows of a table.

        Args:
            name: the table.
            columns: only these columns, in this order.
            filters: a pyarrow expression, or tuples in disjunctive normal form, such as ``[("trial", "=", "x")]``.
            version: as of this version instead of the newest.

        Returns:
            The rows in no particular order; no rows, with the right columns, for an absent table that ``tables.py``
            knows.

        Raises:
            KeyError: the table is absent and its columns are not known.
        """
        ...

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return the rows appended after one version, up to and including another.

        The additional int64 column ``_commit_version`` holds the version that brought each row. Works for ``bronze/*``
        (their change data feed is on); compaction is no change.
        """
        ...

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
        """Append rows in one commit and return its version.

        Columns are cast to the table's types; columns missing from `data` are null; new ones are added to the table.

        Args:
            name: the table; created when absent.
            data: the rows; may be empty, to record transactions only.
            transactions: app id -> version that this commit records, such as the next offset of a Kafka partition.
            expected: app id -> version that must be recorded now (None: none yet) for the append to be right. Give it
                where `data` starts at a recorded position. Default: any lower version, as long as no other writer
                changes it during this call.
            partition_by: partition columns, used when the table is created (default: those its name implies).
            metadata: kept in the commit and shown by :meth:`history`.

        Returns:
            The new version; None, and nothing written, where all `transactions` are recorded already at these or
            higher versions.

        Raises:
            TransactionMovedError: a part of `transactions` is recorded already, is not as `expected`, or another
                writer moved one during the call without reaching this version: appending could double rows.
        """
        ...

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
        """Replace the rows that match `predicate` (SQL; None: all rows and the columns) by `data`, in one commit.

        `transactions` are recorded by the commit; `expected` (app id -> version, None: none yet) must be recorded
        when it is made. Together they let a replacement fail that was prepared from rows that have changed since.

        Raises:
            ValueError: a row of `data` does not match `predicate`.
            TransactionMovedError: another writer moved one of `expected`.
        """
        ...

    def transaction_version(self, name: str, app_id: str) -> int | None:
        """Return the version recorded for an app id; None where there is none, or no table."""
        ...

    def row_count(self, name: str) -> int:
        """Return the number of rows, from the table's metadata; 0 for an absent table."""
        ...

    def history(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the commits, newest first, with ``version``, ``timestamp`` (ms), ``operation`` and commit metadata."""
        ...

    def maintain(self, name: str, *, min_small_files: int = 16, retention_hours: int = 168) -> Maintenance:
        """Compact where at least `min_small_files` could be merged; else do nothing but look.

        A compaction is followed by a checkpoint and by the removal of files that no version of the last
        `retention_hours` uses.
        """
        ...


def known_schema(name: str) -> pa.Schema | None:
    """Return the Arrow schema that ``tables.py`` gives a table, None for a name it does not describe.

    ``gold/patient_features`` has its key columns here; features are added by the writer.
    """
    layer, _, domain = name.partition("/")
    columns = {
        names.QUARANTINE: names.QUARANTINE_COLUMNS,
        names.DUPLICATES: names.DUPLICATES_COLUMNS,
        names.FEATURES: names.FEATURE_KEY_COLUMNS,
        names.FEATURE_STAGING: names.FEATURE_STAGING_COLUMNS,
        names.PREDICTIONS: names.PREDICTIONS_COLUMNS,
        names.COHORT_MEMBERS: names.COHORT_MEMBERS_COLUMNS,
        names.COHORT_ATTRITION: names.COHORT_ATTRITION_COLUMNS,
        names.COHORT_DEFINITIONS: names.COHORT_DEFINITIONS_COLUMNS,
        names.PREDICTION_OUTCOMES: names.PREDICTION_OUTCOMES_COLUMNS,
        names.MODEL_PERFORMANCE: names.MODEL_PERFORMANCE_COLUMNS,
        names.DATA_DRIFT: names.DATA_DRIFT_COLUMNS,
        names.QUALITY_SCORES: names.QUALITY_SCORES_COLUMNS,
        names.CLEANING_LOG: names.CLEANING_LOG_COLUMNS,
    }.get(name)
    if columns is None and domain in names.DOMAINS:
        columns = {"bronze": names.BRONZE_COLUMNS, "silver": names.SILVER_COLUMNS[domain]}.get(layer)
    return None if columns is None else names.arrow_schema(columns)


def default_partitions(name: str) -> list[str]:
    """Return the partition columns of a table that ``tables.py`` knows, none for the others."""
    return {names.FEATURES: ["feature_date"], names.PREDICTIONS: ["prediction_date"]}.get(name, [])


def table_configuration(name: str) -> dict[str, str | None]:
    """Return the Delta properties a table is created with.

    Reader protocol 1: no deletion vectors or column mapping, so that Spark, delta-rs, polars and DuckDB all read it.
    Bronze has its change data feed on: silver reads what was appended since the version it knows.
    """
    configuration: dict[str, str | None] = {"delta.checkpointInterval": "20"}
    if name.startswith("bronze/"):
        configuration["delta.enableChangeDataFeed"] = "true"
    return configuration


def conform(data: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `data` with the columns and types of `schema`: missing ones null, additional ones kept at the end.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit its column's type.
    """
    import pyarrow as pa

    columns, fields = [], []
    for field in schema:
        if field.name in data.column_names:
            column = data.column(field.name)
            columns.append(column if column.type == field.type else column.cast(field.type))
        else:
            columns.append(pa.chunked_array([pa.nulls(data.num_rows, field.type)]))
        fields.append(pa.field(field.name, field.type))
    for field in data.schema:
        if field.name not in schema.names:
            columns.append(data.column(field.name))
            fields.append(pa.field(field.name, field.type))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def storage_options(settings: ClientSettings) -> dict[str, str]:
    """Return delta-rs options for the S3 of these settings; commits use conditional puts, so writers cannot collide."""
    options = {
        "AWS_ENDPOINT_URL": settings.s3_endpoint,
        "AWS_REGION": settings.s3_region,
        "AWS_ALLOW_HTTP": "true",
        "aws_conditional_put": "etag",
    }
    if settings.s3_access_key:  # else the client's own chain: instance roles, profiles
        options["AWS_ACCESS_KEY_ID"] = settings.s3_access_key
        options["AWS_SECRET_ACCESS_KEY"] = settings.s3_secret_key.get_secret_value()
    return options


class DeltaTableStore:
    """Delta tables under a folder or an ``s3://`` root, through delta-rs.

    Safe to share between threads and processes: it holds no open table. It must not be *used* before a fork that
    goes on to use it, because delta-rs starts threads.
    """

    def __init__(self, root: str, storage_options: Mapping[str, str] | None = None) -> None:
        self.root = str(root).rstrip("/")
        self._options = dict(storage_options or {})

    @classmethod
    def from_settings(cls, settings: ClientSettings | None = None) -> DeltaTableStore:
        """Return the store of the deployment that the environment describes."""
        settings = settings or ClientSettings()
        root = lake_root(settings)
        return cls(root, storage_options(settings) if root.startswith("s3://") else None)

    def __repr__(self) -> str:
        return f"DeltaTableStore({self.root!r})"

    def uri(self, name: str) -> str:
        """See :class:`TableStore`."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """See :class:`TableStore`."""
        return self._open(name) is not None

    def ensure(self, name: str, *, schema: pa.Schema | None = None, partition_by: Sequence[str] | None = None) -> int:
        """See :class:`TableStore`."""
        table = self._open(name)
        if table is None:
            schema = known_schema(name) if schema is None else schema
            if schema is None:
                raise KeyError(f"table {name} is absent and tables.py does not describe it")
            table = self._create(name, schema, default_partitions(name) if partition_by is None else partition_by)
        return int(table.version())

    def version(self, name: str) -> int | None:
        """See :class:`TableStore`."""
        table = self._open(name)
        return None if table is None else int(table.version())

    def read(
        self,
        name: str,
        *,
        columns: Sequence[str] | None = None,
        filters: Any = None,
        version: int | None = None,
    ) -> pa.Table:
        """See :class:`TableStore`."""
        table = self._open(name, version)
        if table is None:
            schema = known_schema(name)
            if schema is None:
                raise KeyError(f"table {name} is absent and tables.py does not describe it")
            empty = schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        return table.to_pyarrow_table(columns=None if columns is None else list(columns), filters=filters)

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """See :class:`TableStore`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self._open(name)
        if table is None:
            raise KeyError(f"table {name} is absent")
        schema = pa.schema(table.schema().to_arrow())
        wanted = list(columns) if columns is not None else schema.names
        target = pa.schema([*(schema.field(c) for c in wanted), pa.field(COMMIT_VERSION, pa.int64())])
        if to_version <= from_version_exclusive:
            return target.empty_table()
        changes = pa.table(
            table.load_cdf(starting_version=from_version_exclusive + 1, ending_version=to_version).read_all()
        )
        inserted = pc.equal(changes.column("_change_type").cast(pa.string()), "insert")
        return changes.select([*wanted, COMMIT_VERSION]).cast(target).filter(inserted)

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
        """See :class:`TableStore`."""
        from deltalake import write_deltalake

        first_seen: dict[str, int | None] | None = None

        def attempt() -> int | None:
            nonlocal first_seen
            table = self._open(name)
            if table is None:
                schema = known_schema(name)
                schema = conform(data, schema).schema if schema is not None else data.schema
                by = default_partitions(name) if partition_by is None else list(partition_by)
                table = self._create(name, schema, by)
            # of this very snapshot, also where another writer created the table in the meantime
            recorded = {app: table.transaction_version(app) for app in transactions or {}}
            if first_seen is None:
                first_seen = {**recorded, **(expected or {})}
            if transactions and already_recorded(transactions, recorded, first_seen):
                return None
            # the open table is what conflicts are checked against: a commit by another writer on the same app id
            # after it was opened makes this one fail, and the next attempt looks again
            write_deltalake(
                table,
                conform(data, _arrow_schema(table)),
                mode="append",
                schema_mode="merge",
                commit_properties=_commit_properties(transactions, metadata),
            )
            return int(table.version())

        return _retried(attempt)

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
        """See :class:`TableStore`."""
        from deltalake import write_deltalake
        from deltalake.exceptions import DeltaError

        def attempt() -> int:
            table = self._open(name)
            if table is None:
                schema = known_schema(name)
                schema = conform(data, schema).schema if schema is not None else data.schema
                by = default_partitions(name) if partition_by is None else list(partition_by)
                table = self._create(name, schema, by)
            check_expected(expected, table.transaction_version)
            if predicate is None:
                known = known_schema(name)
                rows = data if known is None else conform(data, known)
                by = list(partition_by) if partition_by is not None else list(table.metadata().partition_columns)
                write_deltalake(
                    table,
                    rows,
                    mode="overwrite",
                    schema_mode="overwrite",
                    partition_by=by or None,
                    commit_properties=_commit_properties(transactions, metadata),
                )
            else:
                try:
                    write_deltalake(
                        table,
                        conform(data, _arrow_schema(table)),
                        mode="overwrite",
                        schema_mode="merge",
                        predicate=predicate,
                        commit_properties=_commit_properties(transactions, metadata),
                    )
                except DeltaError as error:
                    if "failed validation check" not in str(error):
                        raise
                    # delta-rs prints the rows: they must reach no log
                    raise ValueError(f"a row for {name} does not match the predicate {predicate!r}") from None
            return int(table.version())

        return _retried(attempt)

    def transaction_version(self, name: str, app_id: str) -> int | None:
        """See :class:`TableStore`."""
        table = self._open(name)
        return None if table is None else table.transaction_version(app_id)

    def row_count(self, name: str) -> int:
        """See :class:`TableStore`."""
        table = self._open(name)
        return 0 if table is None else int(table.count())

    def history(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """See :class:`TableStore`."""
        table = self._open(name)
        return [] if table is None else list(table.history(limit))

    def maintain(self, name: str, *, min_small_files: int = 16, retention_hours: int = 168) -> Maintenance:
        """See :class:`TableStore`."""
        import pyarrow as pa

        table = self._open(name)
        if table is None:
            return Maintenance(0, 0, 0)
        files = pa.table(table.get_add_actions(flatten=True))
        by = [column for column in files.column_names if column.startswith("partition.")]
        partitions = files.select(by).group_by(by).aggregate([]).num_rows if by else 1
        before = int(files.num_rows)
        if before - partitions < min_small_files:
            return Maintenance(before, before, 0)

        def attempt() -> DeltaTable:
            current = self._open(name)
            if current is None:
                raise KeyError(f"table {name} was removed while it was being compacted")
            current.optimize.compact()
            return current

        compacted = _retried(attempt)
        compacted.create_checkpoint()
        removed = compacted.vacuum(retention_hours=retention_hours, dry_run=False, enforce_retention_duration=False)
        return Maintenance(before, len(compacted.file_uris()), len(removed))

    def _open(self, name: str, version: int | None = None) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(self.uri(name), version=version, storage_options=self._options or None)
        except TableNotFoundError:
            return None

    def _create(self, name: str, schema: pa.Schema, partition_by: Sequence[str]) -> DeltaTable:
        """Create the table, or open the one that another writer created first."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        if not self.root.startswith("s3://"):
            Path(self.uri(name)).mkdir(parents=True, exist_ok=True)
        try:
            DeltaTable.create(
                self.uri(name),
                schema=schema,
                partition_by=list(partition_by) or None,
                configuration=table_configuration(name),
                storage_options=self._options or None,
            )
        except DeltaError:
            if (table := self._open(name)) is None:
                raise
            return table
        table = self._open(name)
        if table is None:
            raise RuntimeError(f"table {name} cannot be read directly after its creation")
        return table


def check_expected(expected: Mapping[str, int | None] | None, recorded: Callable[[str], int | None]) -> None:
    """Make sure that what a writer expects is recorded; part of :meth:`TableStore.replace`.

    Raises:
        TransactionMovedError: it is not.
    """
    moved = {app: at for app, version in (expected or {}).items() if (at := recorded(app)) != version}
    if moved:
        raise TransactionMovedError(
            "; ".join(f"{app} is at {at}, expected {(expected or {})[app]}" for app, at in sorted(moved.items()))
        )


def already_recorded(
    wanted: Mapping[str, int], recorded: Mapping[str, int | None], expected: Mapping[str, int | None]
) -> bool:
    """Return whether all `wanted` transactions are recorded; part of :meth:`TableStore.append`.

    Raises:
        TransactionMovedError: some are and some are not, or one is not at its `expected` version.
    """
    done = {app for app, version in wanted.items() if (at := recorded.get(app)) is not None and at >= version}
    if done == set(wanted):
        return True
    if done:
        raise TransactionMovedError(f"a part of these transactions is recorded already: {', '.join(sorted(done))}")
    moved = [app for app in wanted if recorded.get(app) != expected.get(app)]
    if moved:
        raise TransactionMovedError(
            "; ".join(f"{app} is at {recorded.get(app)}, expected {expected.get(app)}" for app in sorted(moved))
        )
    return False


def _arrow_schema(table: DeltaTable) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(table.schema().to_arrow())


def _commit_properties(
    transactions: Mapping[str, int] | None, metadata: Mapping[str, str] | None
) -> CommitProperties | None:
    from deltalake import CommitProperties, Transaction

    if not transactions and not metadata:
        return None
    return CommitProperties(
        custom_metadata=dict(metadata) if metadata else None,
        app_transactions=[Transaction(app, version) for app, version in (transactions or {}).items()] or None,
    )


def _retried(attempt: Callable[[], _T]) -> _T:
    """Repeat a commit that lost a race; each attempt opens the table anew."""
    from deltalake.exceptions import CommitFailedError

    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except CommitFailedError:
            if number == _ATTEMPTS:
                raise
            time.sleep(random.uniform(0.01, 0.05 * number))
    raise RuntimeError("unreachable: the loop returns or raises")
