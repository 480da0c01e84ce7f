"""Spark over Delta tables: one session over Spark Connect, and tables by name for it.

:class:`DeltaSparkTables` lets Spark read and write the tables itself (connector jars on the server);
:class:`ArrowSparkTables` serves a server without connectors: Spark computes, delta-rs reads and writes, rows travel as
Arrow through this process. Both record progress as Delta app transactions, so that a repeated append changes nothing.

Each table that Spark writes has one writing process at a time: Delta's log on S3 is atomic for delta-rs, but not
between two Spark drivers.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.tables import COMMIT_VERSION, TableStore, default_partitions

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

BATCH_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"

_CONFIGURATION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.adaptive.enabled": "true",
    # adaptive execution only ever merges shuffle partitions: this is the ceiling; clusters raise it on the server
    "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
    BATCH_ROWS: "10000",
}

ARROW_ROWS = 100_000
"""Up to so many rows (about 1 KB each), increments and appends go through this process; larger ones stay in Spark."""


class SparkUnavailableError(ConnectionError):
    """Spark Connect does not answer; the message says where it was expected."""


class SparkSessions:
    """The one Spark session of a process: created at first use, created anew when its server was restarted."""

    def __init__(self, settings: ClientSettings | None = None, configuration: Mapping[str, str] | None = None) -> None:
        self._settings = settings
        self._configuration = dict(configuration or {})
        self._session: SparkSession | None = None
        self._lock = threading.Lock()

    def get(self) -> SparkSession:
        """Return a session that answers.

        Raises:
            SparkUnavailableError: nothing listens at ``SPARK_REMOTE``.
        """
        with self._lock:
            remote = (self._settings or ClientSettings()).spark_remote
            # the client library would retry for minutes: ask the port first
            _check_listening(remote)
            if self._session is not None and not _answers(self._session):
                self._session = None
            if self._session is None:
                self._session = _create(remote)
                atexit.unregister(self._end)
                atexit.register(self._end)
                for name, value in self._configuration.items():
                    self._session.conf.set(name, value)
            return self._session

    def close(self) -> None:
        """End the session on the server; the next :meth:`get` creates another."""
        with self._lock:
            if self._session is not None:
                self._session.stop()
                self._session = None

    def _end(self) -> None:
        """End the session with its process: the server would keep it, with the plans of the whole run, for an hour."""
        with contextlib.suppress(SparkUnavailableError):
            # the client would try for a minute to reach a server that is gone
            _check_listening((self._settings or ClientSettings()).spark_remote)
            self.close()


_default_sessions = SparkSessions()


def spark_session(settings: ClientSettings | None = None) -> SparkSession:
    """Return the process's session with the server at ``SPARK_REMOTE``; see :class:`SparkSessions`."""
    return _default_sessions.get() if settings is None else SparkSessions(settings).get()


class SparkTables(Protocol):
    """Tables by name, as Spark data frames."""

    @property
    def session(self) -> SparkSession:
        """The Spark session that computes."""
        ...

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """Return a table, now or as of `version`; a known absent table is created empty.

        Raises:
            KeyError: the table is absent and ``tables.py`` does not describe it.
        """
        ...

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, rows: int | None = None
    ) -> DataFrame:
        """Return the rows appended after one version up to another, with a long column ``_commit_version``.

        `rows` says how many these are, where that is known.
        """
        ...

    def append(self, name: str, df: DataFrame, *, app_id: str, app_version: int, rows: int | None = None) -> int | None:
        """Append in one commit that records `app_version` for `app_id`, also where `df` has no rows.

        Args:
            name: the table.
            df: the rows.
            app_id: whose progress the commit records.
            app_version: the progress.
            rows: how many rows `df` has, at most, where that is known.

        Returns:
            The table's version then; None, and nothing written, where this or a higher version is recorded.
        """
        ...

    def replace_partitions(
        self, name: str, df: DataFrame, partition_by: list[str] | None = None, predicate: str | None = None
    ) -> int:
        """Replace the rows that match `predicate` (SQL; None: all) by `df`, in one commit; return the version.

        New columns of `df` are added to the table. `partition_by` counts when the table is created.
        """
        ...

    def transaction_version(self, name: str, app_id: str) -> int | None:
        """Return the version recorded for an app id, None where there is none."""
        ...


class DeltaSparkTables:
    """Spark reads and writes Delta itself, on S3 (``s3a``) or a folder that the server shares.

    Small increments and appends go through this process as Arrow and are read and committed by the store: Delta in
    Spark costs a few jobs and one to two seconds of computing a table, whatever the size (measured: 57 s of computing
    for the first 100,000 rows of a cold server, 38 s by Arrow).
    """

    def __init__(self, sessions: SparkSessions, store: TableStore, *, arrow_rows: int = ARROW_ROWS) -> None:
        self._sessions = sessions
        self._store = store
        self._arrow_rows = arrow_rows

    @property
    def session(self) -> SparkSession:
        """See :class:`SparkTables`."""
        return self._sessions.get()

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """See :class:`SparkTables`."""
        self._store.ensure(name)
        reader = self.session.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        return reader.load(self._path(name))

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, rows: int | None = None
    ) -> DataFrame:
        """See :class:`SparkTables`."""
        from pyspark.sql import functions as F  # noqa: N812

        self._store.ensure(name)
        if rows is not None and rows <= self._arrow_rows:
            return _frame(self.session, self._store.read_appended(name, from_version_exclusive, to_version))
        if to_version <= from_version_exclusive:
            return self.read(name).withColumn(COMMIT_VERSION, F.lit(None).cast("long")).limit(0)
        changes = (
            self.session.read.format("delta")
            .option("readChangeFeed", "true")
            .option("startingVersion", from_version_exclusive + 1)
            .option("endingVersion", to_version)
            .load(self._path(name))
        )
        return changes.where("_change_type = 'insert'").drop("_change_type", "_commit_timestamp")

    def append(self, name: str, df: DataFrame, *, app_id: str, app_version: int, rows: int | None = None) -> int | None:
        """See :class:`SparkTables`."""
        self._store.ensure(name)
        recorded = self.transaction_version(name, app_id)
        if recorded is not None and recorded >= app_version:
            return None
        if rows is not None and rows <= self._arrow_rows:
            return self._store.append(
                name, df.toArrow(), transactions={app_id: app_version}, expected={app_id: recorded}
            )
        (
            df.write.format("delta")
            .mode("append")
            .option("mergeSchema", "true")
            .option("txnAppId", app_id)
            .option("txnVersion", app_version)
            .save(self._path(name))
        )
        return self._store.version(name)

    def replace_partitions(
        self, name: str, df: DataFrame, partition_by: list[str] | None = None, predicate: str | None = None
    ) -> int:
        """See :class:`SparkTables`."""
        from pyspark.sql.pandas.types import to_arrow_schema

        by = default_partitions(name) if partition_by is None else partition_by
        self._store.ensure(name, schema=to_arrow_schema(df.schema), partition_by=by)
        writer = df.write.format("delta").mode("overwrite")
        if predicate is None:
            writer = writer.option("overwriteSchema", "true")
            writer = writer.partitionBy(*by) if by else writer
        else:
            writer = writer.option("mergeSchema", "true").option("replaceWhere", predicate)
        writer.save(self._path(name))
        version = self._store.version(name)
        if version is None:
            raise RuntimeError(f"Spark wrote {name}, but it cannot be read at {self._store.uri(name)}")
        return version

    def transaction_version(self, name: str, app_id: str) -> int | None:
        """See :class:`SparkTables`."""
        return self._store.transaction_version(name, app_id)

    def _path(self, name: str) -> str:
        uri = self._store.uri(name)
        return "s3a://" + uri[len("s3://") :] if uri.startswith("s3://") else uri


class ArrowSparkTables:
    """Spark computes without connectors: rows go through this process as Arrow, tables through a :class:`TableStore`.

    Sizes are bounded by this process's memory: meant for one machine.
    """

    def __init__(self, sessions: SparkSessions, store: TableStore) -> None:
        self._sessions = sessions
        self._store = store

    @property
    def session(self) -> SparkSession:
        """See :class:`SparkTables`."""
        return self._sessions.get()

    def read(self, name: str, version: int | None = None) -> DataFrame:
        """See :class:`SparkTables`."""
        self._store.ensure(name)
        return _frame(self.session, self._store.read(name, version=version))

    def read_appended(
        self, name: str, from_version_exclusive: int, to_version: int, *, rows: int | None = None
    ) -> DataFrame:
        """See :class:`SparkTables`."""
        self._store.ensure(name)
        return _frame(self.session, self._store.read_appended(name, from_version_exclusive, to_version))

    def append(self, name: str, df: DataFrame, *, app_id: str, app_version: int, rows: int | None = None) -> int | None:
        """See :class:`SparkTables`."""
        recorded = self.transaction_version(name, app_id)
        if recorded is not None and recorded >= app_version:
            return None
        return self._store.append(name, df.toArrow(), transactions={app_id: app_version}, expected={app_id: recorded})

    def replace_partitions(
        self, name: str, df: DataFrame, partition_by: list[str] | None = None, predicate: str | None = None
    ) -> int:
        """See :class:`SparkTables`."""
        return self._store.replace(name, df.toArrow(), predicate=predicate, partition_by=partition_by)

    def transaction_version(self, name: str, app_id: str) -> int | None:
        """See :class:`SparkTables`."""
        return self._store.transaction_version(name, app_id)


def spark_tables(
    store: TableStore,
    settings: ClientSettings | None = None,
    sessions: SparkSessions | None = None,
    *,
    batch_rows: int | None = None,
) -> SparkTables:
    """Return the implementation that fits the deployment: by Spark itself where its connectors are installed.

    `batch_rows` are handed to Python functions at once.
    """
    settings = settings or ClientSettings()
    sessions = sessions or SparkSessions(settings, {} if batch_rows is None else {BATCH_ROWS: str(batch_rows)})
    return DeltaSparkTables(sessions, store) if settings.spark_connectors else ArrowSparkTables(sessions, store)


def _frame(session: SparkSession, rows: pa.Table) -> DataFrame:
    from pyspark.sql.pandas.types import from_arrow_schema

    if rows.num_rows == 0:  # Arrow without rows is refused, whatever its schema
        return session.createDataFrame([], from_arrow_schema(rows.schema))
    return session.createDataFrame(rows)


def _check_listening(remote: str) -> None:
    address = urlsplit(remote.partition(";")[0])
    host, port = address.hostname or "127.0.0.1", address.port or 15002
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise SparkUnavailableError(
            f"Spark Connect does not answer at {host}:{port} ({error}); start level 2 of the stack or set SPARK_REMOTE"
        ) from error


def _create(remote: str) -> SparkSession:
    from pyspark.sql import SparkSession
    from pyspark.sql.connect.client.retries import DefaultPolicy

    # the general builder, because it also makes pyspark.sql.functions speak Spark Connect
    builder = SparkSession.builder.remote(remote)
    for name, value in _CONFIGURATION.items():
        builder = builder.config(name, value)
    session = builder.create()
    # a server that is gone fails a run after about a minute; the library's own policy waits for ten. A restarted
    # server does not know the session anyway: the run is retried and loses nothing
    session.client.set_retry_policies([DefaultPolicy(max_retries=8, max_backoff=10_000)])
    return session


def _answers(session: SparkSession) -> bool:
    from pyspark.errors import PySparkException

    try:
        # needs the session, unlike its version; the server does not know it where it was restarted
        return bool(session.conf.get("spark.sql.session.timeZone") == "UTC")
    except PySparkException:
        return False
