"""Backfills of ``gold/patient_features``: the rows of a range of days, computed again from history.

In phases that can each be repeated: :meth:`FeatureBackfill.history` says what records there are,
:meth:`FeatureBackfill.stage` computes the range in one Spark job into ``staging/patient_features``,
:meth:`FeatureBackfill.check` looks at the staged rows, :meth:`FeatureBackfill.load` writes the days that differ in one
commit. A phase that is killed has written nothing or everything; a repeated one finds its work done.

Point in time: a row's features follow from records before it, so history before the range is read as far as each
family looks back (vital signs: the longest window; labs, medications and events: all of it).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from clinical_orchestration.features.changes import (
    KEYS,
    Differences,
    FeatureChange,
    ValueReport,
    check_values,
    differences,
    expected_times,
)
from clinical_orchestration.features.definitions import feature_names, feature_set_id, longest_window
from clinical_orchestration.stores.feature_store import (
    ARROW_ROWS,
    FeatureState,
    WriteGuard,
    planned_once,
    read_rows,
    row_counts,
    trial_predicate,
)
from clinical_orchestration.stores.tables import TransactionMovedError
from clinical_orchestration.tables import (
    DOMAINS,
    FEATURE_KEY_COLUMNS,
    FEATURE_STAGING,
    FEATURES,
    arrow_schema,
    silver,
)

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyspark.sql import DataFrame

    from clinical_orchestration.stores.spark import SparkTables
    from clinical_orchestration.stores.tables import TableStore
    from clinical_orchestration.trials import TrialProfile

ATTEMPTS = 3
"""How often a write is prepared again after another writer changed the trial's rows meanwhile."""

COMMIT_REQUEST, COMMIT_RUN, COMMIT_DIFFERENCES = "backfill_request", "backfill_run", "backfill_differences"
_HISTORY_COMMITS = 50


@dataclass(frozen=True)
class Days:
    """A range of UTC days, both ends included."""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise ValueError(f"the range ends ({self.last}) before it begins ({self.first})")

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"

    def __len__(self) -> int:
        return (self.last - self.first).days + 1

    @property
    def begin(self) -> datetime:
        """The first moment of the range."""
        return datetime.combine(self.first, clock_time(), UTC)

    @property
    def end(self) -> datetime:
        """The first moment after the range."""
        return datetime.combine(self.last + timedelta(days=1), clock_time(), UTC)

    def predicate(self) -> str:
        """Return the SQL that selects the range's feature dates."""
        return (
            f"feature_date >= CAST('{self.first.isoformat()}' AS DATE) "
            f"AND feature_date <= CAST('{self.last.isoformat()}' AS DATE)"
        )


_RANGE = ("start_date", "end_date")


def days_of_conf(conf: Mapping[str, Any]) -> tuple[date | None, date | None]:
    """Return the first and last day that the conf of a backfill asks for; None for what it leaves open.

    Args:
        conf: ``start_date`` and ``end_date``: ISO 8601 days, both included; of a date with a time the UTC day counts.

    Raises:
        ValueError: a value is no date, the range ends before it begins, or a key is nearly one of the two (it would
            leave the range open, and the whole trial would be computed); the message says which.
    """
    for key in conf.keys() - _RANGE:
        if meant := get_close_matches(key.lower(), _RANGE, n=1, cutoff=0.5):
            raise ValueError(f"{key!r} is not known; write {meant[0]}")
    first, last = (_day(name, conf.get(name)) for name in _RANGE)
    if first is not None and last is not None and last < first:
        raise ValueError(f"end_date {last} is before start_date {first}")
    return first, last


def _day(name: str, value: object) -> date | None:
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str):
            raise TypeError
        moment = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        raise ValueError(f'{name} {value!r} is no date; write it as "2013-01-31"') from None
    return moment.astimezone(UTC).date() if moment.tzinfo else moment.date()


@dataclass(frozen=True)
class DomainHistory:
    """The records of one domain that a range has.

    Attributes:
        domain: the silver table.
        version: its Delta version; None where it does not exist.
        rows: records of the trial.
        in_range: records whose time is in the range.
        before: records before the range; features look back on them.
        subjects: patients with a record in the range.
        days: days of the range with a record.
        first: time of the first record in the range (UTC).
        last: time of the last record in the range (UTC).
        repeated_keys: records in the range whose natural key another one has.
        without_time: records of the trial without a time; no feature can use them.
    """

    domain: str
    version: int | None
    rows: int = 0
    in_range: int = 0
    before: int = 0
    subjects: int = 0
    days: int = 0
    first: datetime | None = None
    last: datetime | None = None
    repeated_keys: int = 0
    without_time: int = 0


@dataclass(frozen=True)
class History:
    """What a range of days is computed from.

    Attributes:
        trial: name of the trial profile.
        days: the range.
        domains: one entry a silver table.
        expected_rows: feature rows that the range's vital signs call for.
        unknown_subjects: patients with a vital sign in the range and no record in ``silver/subjects``.
        longest_gap_days: longest run of days in the range, between the first and last with vital signs, without any.
    """

    trial: str
    days: Days
    domains: tuple[DomainHistory, ...]
    expected_rows: int
    unknown_subjects: int
    longest_gap_days: int

    @property
    def versions(self) -> dict[str, int]:
        """Delta version by silver table, of those that exist."""
        return {entry.domain: entry.version for entry in self.domains if entry.version is not None}

    @property
    def empty(self) -> bool:
        """Whether no feature row is due in the range."""
        return self.expected_rows == 0


@dataclass(frozen=True)
class Staged:
    """Rows of a range that are computed and wait to be checked and written.

    Attributes:
        request: what they follow from, hashed.
        rows: how many.
        patients: of how many patients.
        computed: False where an earlier run had left them already.
        seconds: how long it took.
        versions: the silver versions they follow from.
    """

    request: str
    rows: int
    patients: int
    computed: bool
    seconds: float
    versions: Mapping[str, int]


@dataclass(frozen=True)
class StagedReport:
    """What was found in staged rows.

    Attributes:
        values: the value rules.
        missing_rows: rows that the vital signs call for and that are not staged.
        surplus_rows: staged rows that nothing calls for.
    """

    values: ValueReport
    missing_rows: int
    surplus_rows: int

    @property
    def complete(self) -> bool:
        """Whether there is exactly one row for each that there should be."""
        return not self.missing_rows and not self.surplus_rows


@dataclass(frozen=True)
class Loaded:
    """What a load did to ``gold/patient_features``.

    Attributes:
        rows: rows of the trial in the range now.
        patients: their patients.
        differences: against the rows before; of a load that an earlier, interrupted run had committed, those of it.
        written: whether this load made a commit of rows.
        resumed: whether an earlier run of the same request had committed them.
        version_before: version of the table before; None where it did not exist.
        version: version now.
        rows_by_day: rows by day of the range.
        request: what the rows follow from, hashed.
        versions: the silver versions the rows follow from.
    """

    rows: int
    patients: int
    differences: Differences
    written: bool
    resumed: bool
    version_before: int | None
    version: int | None
    rows_by_day: Mapping[date, int]
    request: str
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """How the stored rows of a range compare with what there should be.

    Attributes:
        rows: rows of the trial in the range.
        missing: rows that the vital signs call for and that are not stored.
        surplus: stored rows that nothing calls for.
        differing: rows with another value than the computed one.
        compared: whether values were compared: the computed rows are there until the report is written.
    """

    rows: int
    missing: int
    surplus: int
    differing: int
    compared: bool

    @property
    def holds(self) -> bool:
        """Whether the range holds what it should."""
        return not self.missing and not self.surplus and not self.differing


@dataclass(frozen=True)
class Untouched:
    """Whether the rows outside a range are as they were.

    Attributes:
        rows: rows of the trial outside the range.
        changed_days: days outside the range, and days of other trials, with another number of rows than before.
    """

    rows: int
    changed_days: int

    @property
    def holds(self) -> bool:
        """Whether nothing else changed."""
        return not self.changed_days


class FeatureBackfill:
    """Computes and writes the feature rows of a range of days.

    Args:
        spark: the tables as Spark sees them; only asked to compute.
        tables: the tables through Arrow.
        arrow_rows: up to so many rows go through this process at a time; a wider change is written by Spark.
    """

    def __init__(self, spark: SparkTables, tables: TableStore, *, arrow_rows: int = ARROW_ROWS) -> None:
        self._spark = spark
        self._tables = tables
        self._arrow_rows = arrow_rows

    # ------------------------------------------------------------------------------------------------- what there is

    def span(self, profile: TrialProfile) -> Days | None:
        """Return the days on which the trial can have feature rows: from its first to its last vital sign.

        Rows that are stored outside of them (their records are gone) count too. None where the trial has neither.
        """
        moments = self._times(profile)
        found = [moments["event_time"].min(), moments["event_time"].max()] if moments.height else []
        days = [moment.date() for moment in found if isinstance(moment, datetime)]
        if days and profile.features.times.kind == "interval":
            days.append(days[-1] + timedelta(days=1))  # an interval that ends at midnight belongs to the next day
        days += read_rows(self._tables, profile, ["feature_date"], order=False)["feature_date"].unique().to_list()
        return Days(min(days), max(days)) if days else None

    def versions(self) -> dict[str, int]:
        """Return the Delta version of each silver table that exists."""
        found = {domain: self._tables.version(silver(domain)) for domain in DOMAINS}
        return {domain: version for domain, version in found.items() if version is not None}

    def history(self, profile: TrialProfile, days: Days) -> History:
        """Return what records the trial has for the range, as of now."""
        import polars as pl

        versions = self.versions()
        entries, in_range = [], {}
        for domain in DOMAINS:
            if domain not in versions:
                entries.append(DomainHistory(domain, None))
                continue
            rows = pl.DataFrame(
                self._tables.read(
                    silver(domain),
                    columns=["patient_id", "event_time", "record_key", "source_position"],
                    filters=[("trial", "=", profile.name)],
                    version=versions[domain],
                )
            )
            within = rows.filter((pl.col("event_time") >= days.begin) & (pl.col("event_time") < days.end))
            in_range[domain] = within
            entries.append(
                DomainHistory(
                    domain,
                    versions[domain],
                    rows=rows.height,
                    in_range=within.height,
                    before=rows.filter(pl.col("event_time") < days.begin).height,
                    subjects=within["patient_id"].n_unique(),
                    days=within["event_time"].dt.date().n_unique(),
                    first=_utc(within["event_time"].min()),
                    last=_utc(within["event_time"].max()),
                    repeated_keys=_repeated(within),
                    without_time=rows["event_time"].null_count(),
                )
            )
        vitals = in_range.get("patient_vitals")
        known: set[str] = set()
        if "subjects" in versions:
            subjects = self._tables.read(
                silver("subjects"), columns=["patient_id"], filters=[("trial", "=", profile.name)]
            )
            known = set(subjects["patient_id"].to_pylist())
        seen = set() if vitals is None else set(vitals["patient_id"].to_list())
        dates = [] if vitals is None else sorted(vitals["event_time"].dt.date().unique().to_list())
        gaps = [(later - earlier).days - 1 for earlier, later in itertools.pairwise(dates)]
        return History(
            profile.name,
            days,
            tuple(entries),
            expected_rows=self._expected(profile, days, versions).height,
            unknown_subjects=len(seen - known),
            longest_gap_days=max(gaps, default=0),
        )

    def _times(self, profile: TrialProfile, version: int | None = None) -> pl.DataFrame:
        """Return patient, time and receipt of the trial's vital signs."""
        import polars as pl

        rows = self._tables.read(
            silver("patient_vitals"),
            columns=["patient_id", "event_time", "received_at"],
            filters=[("trial", "=", profile.name)],
            version=version if self._tables.exists(silver("patient_vitals")) else None,
        )
        return pl.DataFrame(rows).drop_nulls("event_time")

    def _expected(self, profile: TrialProfile, days: Days, versions: Mapping[str, int]) -> pl.DataFrame:
        """Return patient and time of the rows that there should be in the range."""
        import polars as pl

        times = expected_times(self._times(profile, versions.get("patient_vitals")), profile)
        return times.filter((pl.col("feature_time") >= days.begin) & (pl.col("feature_time") < days.end))

    # ------------------------------------------------------------------------------------------------------- compute

    def stage(self, profile: TrialProfile, days: Days, versions: Mapping[str, int] | None = None) -> Staged:
        """Compute the range in one Spark job and keep the rows in ``staging/patient_features``.

        Rows that are staged already, for the same range, set of features and silver versions, are taken as they are.
        The trial's staged rows of other requests are removed.

        Args:
            profile: the trial.
            days: the range.
            versions: compute from these silver versions (default: the newest).

        Raises:
            SparkUnavailableError: there is something to compute and Spark does not answer.
        """
        began = time.monotonic()
        versions = self.versions() if versions is None else dict(versions)
        request = request_id(profile, days, versions)
        keys = self._staged_keys(profile, request)
        computed = keys.is_empty() and self._compute(profile, days, versions, request)
        if computed:
            keys = self._staged_keys(profile, request)
        return Staged(
            request=request,
            rows=keys.height,
            patients=keys["patient_id"].n_unique(),
            computed=computed,
            seconds=round(time.monotonic() - began, 3),
            versions=versions,
        )

    def _compute(self, profile: TrialProfile, days: Days, versions: Mapping[str, int], request: str) -> bool:
        """Compute and stage the rows; return whether there was anything to compute."""
        if self._expected(profile, days, versions).is_empty():
            self.discard(profile)
            return False
        rows = self._computed(profile, days, versions)
        predicate = trial_predicate(profile)
        if isinstance(rows, _InSpark):
            from pyspark.sql import functions as F  # noqa: N812

            try:
                staged = rows.frame.withColumn("request", F.lit(request))
                self._spark.replace_partitions(FEATURE_STAGING, staged, partition_by=["trial"], predicate=predicate)
            finally:
                rows.times.unpersist()
            return True
        import pyarrow as pa

        staged_rows = rows.append_column("request", pa.array([request] * rows.num_rows, pa.string()))
        self._tables.replace(FEATURE_STAGING, staged_rows, predicate=predicate, partition_by=["trial"])
        return True

    def _computed(self, profile: TrialProfile, days: Days, versions: Mapping[str, int]) -> pa.Table | _InSpark:
        """Return the rows of the range; or, of too many rows, the frame that gives them."""
        from pyspark.sql import functions as F  # noqa: N812

        from clinical_orchestration.features.compute import compute_features, feature_times

        frames = {domain: self._spark.read(silver(domain), versions.get(domain)) for domain in DOMAINS}
        times = feature_times(frames["patient_vitals"], profile)
        times = times.where(
            (F.unix_micros("feature_time") >= _micros(days.begin)) & (F.unix_micros("feature_time") < _micros(days.end))
        ).persist()
        # whole days, because a feature asks for the first vital sign of a day
        reach = profile.features.windows[longest_window(profile)]
        from_day = _micros(datetime.combine((days.begin - reach).date(), clock_time(), UTC))
        at = F.unix_micros("event_time")
        frames["patient_vitals"] = frames["patient_vitals"].where((at >= from_day) & (at < _micros(days.end)))
        computed = compute_features(frames, times, profile)
        if times.count() > self._arrow_rows:
            return _InSpark(computed, times)
        try:
            with planned_once(self._spark.session):
                rows: pa.Table = computed.toArrow()
        finally:
            times.unpersist()
        return rows

    def _staged_keys(self, profile: TrialProfile, request: str) -> pl.DataFrame:
        return self._staged(profile, request, list(FEATURE_KEY_COLUMNS))

    def _staged(
        self, profile: TrialProfile, request: str, columns: list[str], between: tuple[date, date] | None = None
    ) -> pl.DataFrame:
        return read_rows(
            self._tables, profile, columns, table=FEATURE_STAGING, between=between, where={"request": request}
        )

    def discard(self, profile: TrialProfile) -> None:
        """Remove the trial's staged rows, and files of staged rows that nobody can need any more."""
        if not self._tables.exists(FEATURE_STAGING):
            return
        if not read_rows(self._tables, profile, ["feature_date"], table=FEATURE_STAGING, order=False).is_empty():
            empty = arrow_schema({"request": "string", **FEATURE_KEY_COLUMNS}).empty_table()
            self._tables.replace(FEATURE_STAGING, empty, predicate=trial_predicate(profile), partition_by=["trial"])
        self._tables.maintain(FEATURE_STAGING, min_small_files=0)

    # --------------------------------------------------------------------------------------------------------- check

    def check(self, profile: TrialProfile, days: Days, staged: Staged) -> StagedReport:
        """Check the staged rows: their values, and that they are the ones that there should be."""
        names = list(feature_names(profile))
        keys = self._staged_keys(profile, staged.request)
        expected = self._expected(profile, days, staged.versions)
        reports = [
            check_values(self._staged(profile, staged.request, [*FEATURE_KEY_COLUMNS, *names], chunk), profile)
            for chunk in self._chunks(days, keys)
        ]
        return StagedReport(
            values=_together(reports, profile),
            missing_rows=expected.join(keys, on=list(KEYS), how="anti").height,
            surplus_rows=keys.join(expected, on=list(KEYS), how="anti").height,
        )

    # ---------------------------------------------------------------------------------------------------------- load

    def load(self, profile: TrialProfile, days: Days, staged: Staged, runs: Sequence[str] = ()) -> Loaded:
        """Write the days of the range that differ from what is stored, in one commit; leave all others alone.

        Values equal within :data:`clinical_orchestration.features.changes.TOLERANCE` are equal. Where the stored rows
        follow from newer silver versions than the staged ones (a pipeline ran meanwhile), the range is computed
        again. Where another writer changes the trial's rows meanwhile, they are compared again.

        Args:
            profile: the trial.
            days: the range.
            staged: what :meth:`stage` returned.
            runs: names of this run and of those that it repeats, this one first: rows that one of them has committed
                before it was interrupted are reported as written by this load.

        Raises:
            TransactionMovedError: other writers changed the rows each time.
        """
        for attempt in range(1, ATTEMPTS + 1):
            staged = self._up_to_date(profile, days, staged)
            try:
                return self._load(profile, days, staged, runs)
            except TransactionMovedError:
                if attempt == ATTEMPTS:
                    raise
        raise RuntimeError("unreachable: the loop returns or raises")

    def _up_to_date(self, profile: TrialProfile, days: Days, staged: Staged) -> Staged:
        """Return `staged`; computed again where the rows are gone, or older than those stored."""
        recorded = FeatureState(profile, self._tables).recorded() or {}
        older = any(version > staged.versions.get(domain, -1) for domain, version in recorded.items())
        gone = staged.rows and self._staged_keys(profile, staged.request).is_empty()
        return self.stage(profile, days) if older or gone else staged

    def _load(self, profile: TrialProfile, days: Days, staged: Staged, runs: Sequence[str]) -> Loaded:
        names = list(feature_names(profile))
        columns = [*FEATURE_KEY_COLUMNS, *names]
        guard = WriteGuard(profile, self._tables)
        before = self._tables.version(FEATURES)
        keys = self._staged_keys(profile, staged.request)
        stored_keys = read_rows(self._tables, profile, list(FEATURE_KEY_COLUMNS), between=(days.first, days.last))
        found = Differences()
        for chunk in self._chunks(days, keys, stored_keys):
            found += differences(
                read_rows(self._tables, profile, columns, between=chunk),
                self._staged(profile, staged.request, columns, chunk),
                names,
            )
        resumed = False
        if found.nothing:
            earlier = self._committed(staged, runs)
            resumed = earlier is not None
            found = earlier or found
        else:
            self._replace(profile, staged, found, guard, columns, runs)
        self._record(profile, days, staged)
        version = self._tables.version(FEATURES)
        counts = keys.group_by("feature_date").len()
        return Loaded(
            rows=keys.height,
            patients=keys["patient_id"].n_unique(),
            differences=found,
            written=not resumed and not found.nothing,
            resumed=resumed,
            version_before=before,
            version=version,
            rows_by_day=dict(zip(counts["feature_date"].to_list(), counts["len"].to_list(), strict=True)),
            request=staged.request,
            versions=staged.versions,
        )

    def _replace(
        self,
        profile: TrialProfile,
        staged: Staged,
        found: Differences,
        guard: WriteGuard,
        columns: list[str],
        runs: Sequence[str],
    ) -> None:
        """Replace the trial's rows of the days that differ by the staged ones, in one commit."""
        import polars as pl

        days = ", ".join(f"CAST('{day.isoformat()}' AS DATE)" for day in found.days)
        predicate = f"{trial_predicate(profile)} AND feature_date IN ({days})"
        keys = self._staged_keys(profile, staged.request)
        if keys.filter(pl.col("feature_date").is_in(list(found.days))).height > self._arrow_rows:
            from pyspark.sql import functions as F  # noqa: N812

            frame = self._spark.read(FEATURE_STAGING).where(F.col("request") == staged.request).select(columns)
            frame = frame.where(F.col("feature_date").isin(list(found.days))).repartition("feature_date")
            self._spark.replace_partitions(FEATURES, frame, partition_by=["feature_date"], predicate=predicate)
            return
        rows = read_rows(
            self._tables, profile, columns, dates=found.days, table=FEATURE_STAGING, where={"request": staged.request}
        )
        self._tables.replace(
            FEATURES,
            rows.sort("feature_date", "patient_id").to_arrow(),
            predicate=predicate,
            partition_by=["feature_date"],
            metadata={
                COMMIT_REQUEST: staged.request,
                COMMIT_RUN: runs[0] if runs else "",
                COMMIT_DIFFERENCES: _to_text(found),
            },
            transactions=guard.next,
            expected=guard.seen,
        )

    def _committed(self, staged: Staged, runs: Sequence[str]) -> Differences | None:
        """Return the differences that an interrupted run of this request has written; None where there was none.

        It is one of `runs`, or any run where the staged rows were found: a run that ends removes them.
        """
        for commit in self._tables.history(FEATURES, _HISTORY_COMMITS):
            if commit.get(COMMIT_REQUEST) == staged.request:
                ours = not staged.computed or commit.get(COMMIT_RUN) in runs
                return _from_text(str(commit.get(COMMIT_DIFFERENCES, ""))) if ours else None
        return None

    def _record(self, profile: TrialProfile, days: Days, staged: Staged) -> None:
        """Record the silver versions where the range is all there is, so that the next pipeline run need not look.

        Of a part of the trial nothing is recorded: rows of other days still follow from the versions recorded before,
        and the patients with newer records are computed again by the next run, wherever the backfill has been.
        """
        span = self.span(profile)
        state = FeatureState(profile, self._tables)
        whole = span is not None and days.first <= span.first and span.last <= days.last
        if whole and state.recorded() != dict(staged.versions):
            state.record(staged.versions)

    # -------------------------------------------------------------------------------------------------------- verify

    def verify(
        self, profile: TrialProfile, days: Days, request: str | None, versions: Mapping[str, int] | None
    ) -> Stored:
        """Read the range back and compare it with what the vital signs call for, and with the computed rows.

        Args:
            profile: the trial.
            days: the range.
            request: which computed rows; None, or rows that are no longer staged: only the keys are compared.
            versions: the silver versions they follow from; None: the newest.
        """
        names = list(feature_names(profile))
        columns = [*FEATURE_KEY_COLUMNS, *names]
        keys = list(KEYS)
        stored = read_rows(self._tables, profile, list(FEATURE_KEY_COLUMNS), between=(days.first, days.last))
        expected = self._expected(profile, days, self.versions() if versions is None else versions)
        staged = self._staged_keys(profile, request) if request else None
        differing = 0
        if staged is not None and not staged.is_empty():
            for chunk in self._chunks(days, staged, stored):
                found = differences(
                    read_rows(self._tables, profile, columns, between=chunk),
                    self._staged(profile, request or "", columns, chunk),
                    names,
                )
                differing += found.changed
        return Stored(
            rows=stored.height,
            missing=expected.join(stored, on=keys, how="anti").height,
            surplus=stored.join(expected, on=keys, how="anti").height,
            differing=differing,
            compared=staged is not None and not staged.is_empty(),
        )

    def untouched(self, profile: TrialProfile, days: Days, before: int | None) -> Untouched:
        """Compare what lies outside of the range, and all of the other trials, with an earlier version of the table."""
        import polars as pl

        mine = pl.col("trial") == profile.name

        def outside(version: int | None) -> pl.DataFrame:
            rows = row_counts(self._tables, version=version)
            return rows.filter(~mine | ~pl.col("feature_date").is_between(days.first, days.last))

        now = outside(None)
        rows = int(now.filter(mine)["rows"].sum())
        if before is None:
            return Untouched(rows, now.height)
        if before == self._tables.version(FEATURES):
            return Untouched(rows, 0)
        then = outside(before)
        changed = pl.concat([now.join(then, on=now.columns, how="anti"), then.join(now, on=now.columns, how="anti")])
        return Untouched(rows, changed.select("trial", "feature_date").n_unique())

    def _chunks(self, days: Days, *keys: pl.DataFrame) -> Iterator[tuple[date, date]]:
        """Cut the range into stretches of days that hold at most ``arrow_rows`` rows of each of `keys`, or one day."""
        rows: dict[date, int] = {}
        for frame in keys:
            counts = frame.group_by("feature_date").len()
            for day, count in zip(counts["feature_date"].to_list(), counts["len"].to_list(), strict=True):
                rows[day] = max(rows.get(day, 0), count)
        if not rows:
            return
        first, held, last = days.first, 0, days.first
        for day in sorted(rows):
            if held and held + rows[day] > self._arrow_rows:
                yield first, last
                first, held = day, 0
            held, last = held + rows[day], day
        yield first, days.last


@dataclass(frozen=True)
class _InSpark:
    """Rows that stay in Spark, and the cached feature times that they follow from."""

    frame: DataFrame
    times: DataFrame


def request_id(profile: TrialProfile, days: Days, versions: Mapping[str, int]) -> str:
    """Return 16 hex digits that are the same for the same rows: trial, features, range and silver versions."""
    text = json.dumps([profile.name, feature_set_id(profile), str(days), dict(sorted(versions.items()))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _together(reports: list[ValueReport], profile: TrialProfile) -> ValueReport:
    """Return the report over all chunks."""
    from dataclasses import replace

    if not reports:
        return ValueReport(0, len(feature_names(profile)), 0.0)
    total = sum(report.rows for report in reports)
    rules = []
    for same in zip(*(report.rules for report in reports), strict=True):
        features = sorted({name for rule in same for name in rule.features})[:10]
        rules.append(
            replace(
                same[0],
                checked=sum(rule.checked for rule in same),
                broken=sum(rule.broken for rule in same),
                features=tuple(features),
            )
        )
    return ValueReport(
        rows=total,
        features=reports[0].features,
        empty_share=sum(report.empty_share * report.rows for report in reports) / total if total else 0.0,
        empty_features=tuple(
            name for name in reports[0].empty_features if all(name in report.empty_features for report in reports)
        ),
        rules=tuple(rules),
    )


def _to_text(found: Differences) -> str:
    return json.dumps({**vars(found), "days": [day.isoformat() for day in found.days],
                       "features": [vars(change) for change in found.features]})  # fmt: skip


def _from_text(text: str) -> Differences | None:
    try:
        content: dict[str, Any] = json.loads(text)
        days = tuple(date.fromisoformat(day) for day in content.pop("days"))
        changes = tuple(FeatureChange(**change) for change in content.pop("features"))
        return Differences(**content, days=days, features=changes)
    except (ValueError, KeyError, TypeError):
        return None


def _micros(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000


def _utc(moment: object) -> datetime | None:
    return moment.astimezone(UTC) if isinstance(moment, datetime) else None


def _repeated(rows: pl.DataFrame) -> int:
    """Count records whose natural key another record has; one record, such as a wide message, may give several rows."""
    records = rows.select("record_key", "source_position").drop_nulls("record_key").unique()
    return records.height - records["record_key"].n_unique()
