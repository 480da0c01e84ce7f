"""Bronze to silver in Spark: decode what is new, then accept, recognise duplicates and quarantine.

A record is accepted when it decodes without reasons and is the first, by bronze version and position, with its
``record_key``. A later record with the same key is a duplicate where its ``content_hash`` is equal too, and is
quarantined as ``conflicting_record`` where it is not. Records already in silver come first.

Progress is the bronze version, recorded with the rows of each destination as the Delta app transaction
``bronze/<domain>``. Silver is written last, so its progress is that of the whole; a run that was killed before is
repeated from there, and destinations it had reached skip what they have. Which record is the accepted one does not
change by repeating, and the end of an increment is recorded (``bronze/<domain>:planned``) before anything is
written, so that a repeated write is the same transaction even where a Spark server still works on the first one.

The decoder runs in Python workers on Spark's executors: on a cluster they need this package (the same version) and
its dependencies ``pyarrow`` and ``pydantic`` installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stores.spark import SparkTables
from clinical_orchestration.stores.tables import COMMIT_VERSION, TableStore
from clinical_orchestration.tables import (
    BRONZE_COLUMNS,
    DOMAINS,
    DUPLICATES,
    DUPLICATES_COLUMNS,
    QUARANTINE,
    QUARANTINE_COLUMNS,
    SILVER_COLUMNS,
    arrow_schema,
    bronze,
    silver,
    spark_ddl,
)
from clinical_orchestration.transforms.decode import decode_arrow, decoded_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

    from clinical_orchestration.trials import TrialProfile

_log = logging.getLogger(__name__)

PARALLEL_DOMAINS = 3
"""Domains refined at the same time: one plans and commits while another computes."""

ROWS_PER_PARTITION = 8_000
"""Rows that one decode task takes: below, a second task costs more than it saves."""

ROWS_PER_FILE = 1_000_000
"""Rows of one written file at most, about."""

MAX_PARTITIONS = 200
"""Decode tasks at most."""

CONFLICT_RULE = "conflicting_record"
"""Rule of the quarantine reason for a record whose key an accepted record with other content has."""

_ROWS = "_rows"
_IDENTITY = ["trial", "source_position"]  # two trials may take the same file
_PASSTHROUGH = {COMMIT_VERSION: "long"}
_QUARANTINED_FROM_RECORD = ("trial", "source", "source_position", "payload", COMMIT_VERSION)

# what Spark and delta-rs say when the log or the files of an old version are gone
_INCREMENT_LOST = (
    "FileNotFound",
    "FILE_NOT_EXIST",
    "DELTA_FILE_NOT_FOUND",
    "DELTA_LOG_FILE_NOT_FOUND",
    "DELTA_TRUNCATED_TRANSACTION_LOG",
    "DELTA_VERSIONS_NOT_CONTIGUOUS",
    "DELTA_VERSION_NOT_FOUND",
    "DELTA_MISSING_FILES_UNEXPECTED_VERSION",
    "NoSuchKey",
    "No such file",
    "not found",
    "nvalid table version",
    "nvalid version",
)


@dataclass(frozen=True)
class DomainReport:
    """What one :func:`refine` did in one domain. Counts are records, but for `rows`.

    ``received == accepted + duplicates + quarantined + known``: `known` were accepted before already, which only
    happens where an old bronze version could not be read any more and everything was looked at again.
    """

    domain: str
    received: int = 0
    accepted: int = 0
    rows: int = 0
    duplicates: int = 0
    quarantined: int = 0
    known: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    from_version: int | None = None
    to_version: int | None = None
    no_new_data: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class RefineReport:
    """What one :func:`refine` did, by domain."""

    domains: dict[str, DomainReport]
    seconds: float

    @property
    def no_new_data(self) -> bool:
        """Whether no domain had anything new."""
        return all(report.no_new_data for report in self.domains.values())

    def total(self, count: str) -> int:
        """Return the sum of one count (``"received"``, ``"accepted"`` ...) over the domains."""
        return sum(int(getattr(report, count)) for report in self.domains.values())

    def reasons(self) -> dict[str, int]:
        """Return how many records broke each rule, most frequent first."""
        counts: dict[str, int] = {}
        for report in self.domains.values():
            for rule, records in report.reasons.items():
                counts[rule] = counts.get(rule, 0) + records
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return {
            "no_new_data": self.no_new_data,
            "seconds": round(self.seconds, 3),
            "domains": {name: asdict(report) for name, report in self.domains.items()},
        }


def refine(
    spark_tables: SparkTables,
    tables: TableStore,
    profiles: Mapping[str, TrialProfile],
    *,
    domains: Sequence[str] = DOMAINS,
    now: datetime,
) -> RefineReport:
    """Bring silver, duplicates and quarantine up to the newest bronze versions.

    Args:
        spark_tables: tables for Spark, which decodes, classifies and writes.
        tables: the same tables, for versions and commits (no Spark job).
        profiles: profile by trial name; records of other trials are quarantined (``unknown_trial``).
        domains: bronze tables to refine.
        now: written as ``quarantined_at`` and ``detected_at``; aware.

    Returns:
        Counts by domain. Where nothing is new, no Spark job runs and no session is opened.

    Raises:
        clinical_orchestration.stores.spark.SparkUnavailableError: there is new data and Spark does not answer.
    """
    started = time.monotonic()
    for name in (QUARANTINE, DUPLICATES, *(silver(domain) for domain in domains)):
        tables.ensure(name)
    pending = {domain: _increment(tables, domain, tables.version(bronze(domain))) for domain in domains}
    for found in pending.values():
        _skip_what_brings_nothing(tables, found)
    reports = {
        domain: DomainReport(domain, from_version=found.after, to_version=found.until, no_new_data=True)
        for domain, found in pending.items()
        if not found.new
    }
    # the largest first, so that the smaller ones fill the gaps
    order = sorted((found for found in pending.values() if found.new), key=lambda found: -found.rows)
    if order:
        run = _Run(spark_tables, tables, profiles, now, Lock())
        with ThreadPoolExecutor(max_workers=PARALLEL_DOMAINS, thread_name_prefix="refine") as pool:
            work = [pool.submit(_refine_domain, run, found) for found in order]
            reports |= {future.result().domain: future.result() for future in work}
    report = RefineReport({domain: reports[domain] for domain in domains}, time.monotonic() - started)
    _log.info(
        "refined %d records: %d accepted, %d duplicates, %d quarantined, %.1f s",
        *(report.total(count) for count in ("received", "accepted", "duplicates", "quarantined")),
        report.seconds,
    )
    return report


@dataclass(frozen=True)
class _Run:
    """What the domains of one :func:`refine` share; `shared` guards the tables that all of them append to."""

    spark_tables: SparkTables
    tables: TableStore
    profiles: Mapping[str, TrialProfile]
    now: datetime
    shared: Lock


@dataclass(frozen=True)
class _Increment:
    """The bronze versions (after, until] of a domain, of those up to `newest`.

    `rows` by the commits' own metrics, 0 where unknown. `planned` is what was recorded when an increment was begun
    last: that one is finished, with the same versions, before another one begins.
    """

    domain: str
    after: int | None
    until: int | None
    newest: int | None
    new: bool
    rows: int
    complete_log: bool
    planned: int | None


def _increment(tables: TableStore, domain: str, newest: int | None) -> _Increment:
    after = tables.transaction_version(silver(domain), bronze(domain))
    planned = tables.transaction_version(silver(domain), _plan(domain))
    start = -1 if after is None else after
    if newest is None or newest <= start:
        return _Increment(domain, after, newest, newest, False, 0, True, planned)
    until = planned if planned is not None and start < planned < newest else newest
    commits = tables.history(bronze(domain), (tables.version(bronze(domain)) or newest) - start)
    commits = [commit for commit in commits if int(commit["version"]) <= until]
    writes = [commit for commit in commits if commit.get("operation") == "WRITE"]
    added = [(commit.get("operationMetrics") or {}).get("num_added_rows") for commit in writes]
    complete = bool(commits) and min(int(commit["version"]) for commit in commits) <= start + 1
    # compaction, and commits that only move offsets, bring nothing
    nothing = complete and all(count is not None and int(count) == 0 for count in added)
    rows = sum(int(count) for count in added if count is not None)
    return _Increment(domain, after, until, newest, not nothing, rows, complete, planned)


def _plan(domain: str) -> str:
    """Return the app id, in silver, of the bronze version up to which an increment was begun."""
    return f"{bronze(domain)}:planned"


def _begin(tables: TableStore, found: _Increment) -> None:
    """Record the increment's end before anything is written.

    A Spark server finishes the write of a client that was killed. With the same end, the same write of the next run
    is the same transaction, and only one of the two is committed.
    """
    if found.planned != found.until and found.until is not None:
        empty = arrow_schema(SILVER_COLUMNS[found.domain]).empty_table()
        app_id = _plan(found.domain)
        tables.append(silver(found.domain), empty, transactions={app_id: found.until}, expected={app_id: found.planned})


def _skip_what_brings_nothing(tables: TableStore, found: _Increment) -> None:
    """Record versions without new rows as processed, so that nothing depends on versions that age away."""
    if not found.new and found.until is not None and found.until != found.after:
        name, app_id = silver(found.domain), bronze(found.domain)
        empty = arrow_schema(SILVER_COLUMNS[found.domain]).empty_table()
        tables.append(name, empty, transactions={app_id: found.until}, expected={app_id: found.after})


def _refine_domain(run: _Run, found: _Increment) -> DomainReport:
    """Refine one domain up to its newest version: first the increment that a killed run left, then the rest."""
    report = _refine_increment(run, found)
    while report.to_version != found.newest:
        following = _increment(run.tables, found.domain, found.newest)
        if not following.new:
            _skip_what_brings_nothing(run.tables, following)
            break
        report = _together(report, _refine_increment(run, following))
    return report


def _together(first: DomainReport, second: DomainReport) -> DomainReport:
    counts = ("received", "accepted", "rows", "duplicates", "quarantined", "known")
    rules = {*first.reasons, *second.reasons}
    reasons = {rule: first.reasons.get(rule, 0) + second.reasons.get(rule, 0) for rule in rules}
    return replace(
        first,
        **{count: getattr(first, count) + getattr(second, count) for count in counts},
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        to_version=second.to_version,
        seconds=round(first.seconds + second.seconds, 3),
    )


def _refine_increment(run: _Run, found: _Increment) -> DomainReport:
    _begin(run.tables, found)
    if found.complete_log:
        after, until = -1 if found.after is None else found.after, found.until or 0
        name, rows = bronze(found.domain), found.rows or None
        try:
            return _refine_rows(run, found, lambda: run.spark_tables.read_appended(name, after, until, rows=rows))
        except Exception as error:
            if not any(text in str(error) for text in _INCREMENT_LOST):
                raise
            _log.warning("%s: versions after %s cannot be read any more", bronze(found.domain), found.after)
    whole = replace(found, until=found.newest, planned=found.until)
    _begin(run.tables, whole)
    return _refine_rows(run, whole, _unaccounted(run.spark_tables, whole))


def _unaccounted(spark_tables: SparkTables, found: _Increment) -> Callable[[], DataFrame]:
    """Return all of bronze but what silver, duplicates and quarantine hold; for when old versions are gone."""

    def read() -> DataFrame:
        from pyspark.sql import functions as F  # noqa: N812

        rows = spark_tables.read(bronze(found.domain), found.until)
        here = F.col("table") == found.domain
        for seen in (
            spark_tables.read(silver(found.domain)),
            spark_tables.read(DUPLICATES).where(here),
            spark_tables.read(QUARANTINE).where(here),
        ):
            rows = rows.join(seen.select(*_IDENTITY).distinct(), _IDENTITY, "left_anti")
        return rows.withColumn(COMMIT_VERSION, F.lit(found.until).cast("long"))

    return read


def _refine_rows(run: _Run, found: _Increment, read: Callable[[], DataFrame]) -> DomainReport:
    from pyspark.sql import functions as F  # noqa: N812

    started = time.monotonic()
    spark_tables, tables = run.spark_tables, run.tables
    domain, app_id, until = found.domain, bronze(found.domain), found.until or 0
    records = read().select(*BRONZE_COLUMNS, COMMIT_VERSION)
    tasks = -(-found.rows // ROWS_PER_PARTITION)
    # a bronze file is one task otherwise
    spread = records.repartition(min(tasks, MAX_PARTITIONS)) if tasks > 1 else records
    decoded = spread.mapInArrow(_decoder(domain, run.profiles), spark_ddl(_decoded_columns(domain))).persist()
    before = spark_tables.read(silver(domain)) if tables.row_count(silver(domain)) else None
    repeats = _repeats(decoded, before).persist()
    try:
        report = _count(decoded, repeats, found)
        left = {name: spark_tables.transaction_version(name, app_id) for name in (QUARANTINE, DUPLICATES)}

        def unwritten(rows: DataFrame, name: str) -> DataFrame:
            """Return the rows that a killed run did not leave in a destination."""
            reached = left[name]
            return rows if reached is None else rows.where(F.col(COMMIT_VERSION) > reached)

        time_now = F.lit(run.now).cast("timestamp")
        if report.quarantined:
            rejected = unwritten(decoded.where("reasons IS NOT NULL"), QUARANTINE).select(
                *_QUARANTINED_FROM_RECORD, "reasons"
            )
            if report.reasons.get(CONFLICT_RULE):
                conflicts = unwritten(repeats.where("_outcome = 'conflict'"), QUARANTINE)
                conflicts = records.join(conflicts.select(*_IDENTITY, "reasons"), _IDENTITY)
                rejected = rejected.unionByName(conflicts.select(*_QUARANTINED_FROM_RECORD, "reasons"))
            rejected = rejected.withColumn("table", F.lit(domain)).withColumn("quarantined_at", time_now)
            rejected = rejected.select(*QUARANTINE_COLUMNS).coalesce(_files(report.quarantined))
            with run.shared:
                spark_tables.append(QUARANTINE, rejected, app_id=app_id, app_version=until, rows=report.quarantined)
        if report.duplicates:
            same = unwritten(repeats.where("_outcome = 'duplicate'"), DUPLICATES)
            same = same.withColumn("table", F.lit(domain)).withColumn("detected_at", time_now)
            same = same.select(*DUPLICATES_COLUMNS).coalesce(_files(report.duplicates))
            with run.shared:
                spark_tables.append(DUPLICATES, same, app_id=app_id, app_version=until, rows=report.duplicates)
        accepted = decoded.where("reasons IS NULL")
        if report.received > report.accepted + report.quarantined or report.reasons.get(CONFLICT_RULE):
            accepted = accepted.join(repeats.select(*_IDENTITY), _IDENTITY, "left_anti")
        accepted = accepted.select(*SILVER_COLUMNS[domain]).coalesce(_files(report.rows))
        spark_tables.append(silver(domain), accepted, app_id=app_id, app_version=until, rows=report.rows)
    finally:
        repeats.unpersist()
        decoded.unpersist()
    return replace(report, seconds=round(time.monotonic() - started, 3))


def _files(rows: int) -> int:
    return max(1, -(-rows // ROWS_PER_FILE))


def _decoded_columns(domain: str) -> dict[str, str]:
    return {**decoded_columns(domain, _PASSTHROUGH), _ROWS: "int"}


def _decoder(
    domain: str, profiles: Mapping[str, TrialProfile]
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return the function that Spark's Python workers run over the batches of one partition."""
    profiles = dict(profiles)

    def decode_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield decode_increment(domain, batch, profiles)

    return decode_batches


def decode_increment(domain: str, batch: pa.RecordBatch, profiles: Mapping[str, TrialProfile]) -> pa.RecordBatch:
    """Decode bronze rows with their ``_commit_version`` for :func:`refine`.

    Returns:
        The columns of ``decode_arrow``, then ``_commit_version`` and ``_rows``: on the first row of each record the
        number of its rows (a vitals message gives several), on the others 0.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    decoded = decode_arrow(domain, batch, profiles, _PASSTHROUGH)
    count = decoded.num_rows
    sizes = np.zeros(count, dtype=np.int32)
    if count:  # the rows of a record follow one another
        positions = decoded.column("source_position")
        changes = pc.not_equal(positions.slice(1), positions.slice(0, count - 1)).fill_null(True)
        starts = np.flatnonzero(np.concatenate([[True], changes.to_numpy(zero_copy_only=False)]))
        sizes[starts] = np.diff(np.append(starts, count))
    return decoded.append_column(_ROWS, pa.array(sizes))


def _repeats(decoded: DataFrame, accepted_before: DataFrame | None) -> DataFrame:
    """Return the decoded records that are not accepted because a record with the same key was before them.

    One row a record: ``source_position``, ``trial``, ``source``, ``duplicate_of`` (position of the accepted record),
    ``_outcome`` (duplicate, conflict, or known: the accepted record itself), ``reasons``, ``_commit_version``,
    ``_rows``. Only keys and positions are shuffled, and only the keys of the increment are looked for in silver.
    """
    from pyspark.sql import functions as F  # noqa: N812

    candidates = decoded.where(f"reasons IS NULL AND {_ROWS} > 0").select(
        "record_key", "content_hash", "source_position", "trial", "source", COMMIT_VERSION, _ROWS
    )
    # positions of one file or partition differ in their number only: shorter is earlier
    arrival = F.struct(
        F.col(COMMIT_VERSION).alias("version"),
        F.length("source_position").alias("length"),
        F.col("source_position").alias("position"),
        F.col("content_hash").alias("hash"),
    )
    keyed = candidates.select("record_key", arrival.alias("arrival"))
    if accepted_before is not None:
        before = accepted_before.withColumn(COMMIT_VERSION, F.lit(-1).cast("long"))
        before = before.join(candidates.select("record_key").distinct(), "record_key", "left_semi")
        keyed = keyed.unionByName(before.select("record_key", arrival.alias("arrival")))
    shared = keyed.groupBy("record_key").agg(F.min("arrival").alias("first"), F.count(F.lit(1)).alias("times"))
    repeats = candidates.join(shared.where("times > 1"), "record_key")
    own = F.col("first.position") == F.col("source_position")
    repeats = repeats.where(~own | (F.col("first.version") < 0))
    outcome = F.when(own, "known").when(F.col("first.hash") == F.col("content_hash"), "duplicate").otherwise("conflict")
    text = F.concat(F.lit(f"{CONFLICT_RULE}: differs from the record accepted before, at "), F.col("first.position"))
    return repeats.select(
        "source_position",
        "trial",
        "source",
        F.col("first.position").alias("duplicate_of"),
        outcome.alias("_outcome"),
        F.array(text).alias("reasons"),
        COMMIT_VERSION,
        _ROWS,
    )


def _count(decoded: DataFrame, repeats: DataFrame, found: _Increment) -> DomainReport:
    """Run the computing jobs of an increment, which fill its caches, and count what they found."""
    from pyspark.sql import functions as F  # noqa: N812

    rules = F.array_distinct(F.transform("reasons", lambda reason: F.substring_index(reason, ":", 1)))
    records, rows = F.count_if(F.col(_ROWS) > 0).alias("records"), F.sum(_ROWS).alias("rows")
    valid = rejected = valid_rows = 0
    reasons: dict[str, int] = {}
    for group in decoded.groupBy(rules.alias("rules")).agg(records, rows).collect():
        if group["rules"] is None:
            valid, valid_rows = int(group["records"]), int(group["rows"])
            continue
        rejected += int(group["records"])
        for rule in group["rules"]:
            reasons[rule] = reasons.get(rule, 0) + int(group["records"])
    repeated: dict[str, int] = {}
    if valid:
        for group in repeats.groupBy("_outcome").agg(records, rows).collect():
            repeated[group["_outcome"]] = int(group["records"])
            valid_rows -= int(group["rows"])
    if conflicts := repeated.get("conflict", 0):
        reasons[CONFLICT_RULE] = reasons.get(CONFLICT_RULE, 0) + conflicts
    return DomainReport(
        domain=found.domain,
        received=valid + rejected,
        accepted=valid - sum(repeated.values()),
        rows=valid_rows,
        duplicates=repeated.get("duplicate", 0),
        quarantined=rejected + conflicts,
        known=repeated.get("known", 0),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        from_version=found.after,
        to_version=found.until,
    )
