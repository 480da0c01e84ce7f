"""The steps of ``feature_backfill``: features of a range of days, from history, checked, stored, verified, reported.

One asset is partitioned by day, ``backfill/patient_features``; the steps around it look at the run's range as a whole.
They are not partitioned, because Dagster writes one planned event a partition and asset when a run is made, which for a
long range and seven assets takes minutes.
"""

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from clinical_orchestration.defs.backfill.report import difference_table, report_html, report_json
from clinical_orchestration.defs.backfill.request import PARTITIONS, PATIENT_FEATURES, run_days
from clinical_orchestration.defs.common import TRIAL_TAG, asset_key, markdown_table, spec, step
from clinical_orchestration.defs.results import RESULT, TRIAL, materialized
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.feature_backfill import Days, FeatureBackfill, History, Loaded, Staged, StagedReport
from clinical_orchestration.stores.feature_store import OfflineStore, compare
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.online import OnlineStore
from clinical_orchestration.stores.spark import SparkTables
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DOMAINS, FEATURES, silver
from clinical_orchestration.trials import TrialProfile

GROUP = "backfill"
HISTORY = "backfill/history"
VALIDATION = "backfill/validation"
ENGINEERED = "backfill/engineered_features"
FEATURE_CHECKS = "backfill/feature_checks"
VERIFICATION = "backfill/verification"
REPORT = "backfill/report"

SINGLE_RUN = dg.BackfillPolicy.single_run()


def _check(name: str, asset: str, description: str, *, blocking: bool = True) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset_key(asset), description=description, blocking=blocking)


TIMES = _check("every_record_has_a_time", VALIDATION, "No record of the trial is without a time.")
UNIQUE = _check("no_record_twice", VALIDATION, "No two records of the range have the same natural key.")
SUBJECTS = _check(
    "subjects_are_known",
    VALIDATION,
    "Every patient with a vital sign in the range has a record among the subjects.",
    blocking=False,
)
VALUES = _check("feature_values_are_valid", FEATURE_CHECKS, "Every computed value keeps the rules of its kind.")
ROWS = _check("rows_are_complete", FEATURE_CHECKS, "There is one computed row for each that the vital signs call for.")
COUNT = _check(
    "features_as_many_as_expected",
    FEATURE_CHECKS,
    "A row has at least as many features as the variable feature_count_threshold says.",
)
FILLED = _check(
    "every_feature_has_values", FEATURE_CHECKS, "No feature is empty in all rows of the range.", blocking=False
)
STORED = _check("stored_rows_equal_computed", VERIFICATION, "The range holds the computed rows, value by value.")
UNTOUCHED = _check("other_days_untouched", VERIFICATION, "Days outside the range and other trials are as before.")
EQUAL = _check("online_equals_offline", VERIFICATION, "The online features of each patient equal the newest row.")


class _Step:
    """What every step begins with: trial, range of days, store, and what earlier steps left for this range."""

    def __init__(
        self, context: dg.AssetExecutionContext, pipeline: PipelineResource, tables: TableStore, spark: SparkTables
    ) -> None:
        self._context = context
        self._began = time.monotonic()
        tagged = context.run.tags.get(TRIAL_TAG)
        if tagged and not pipeline.trial and not pipeline.conf.get("trial"):
            pipeline = PipelineResource(trial=tagged, source=pipeline.source, conf=pipeline.conf)
        self.profile: TrialProfile = pipeline.profile()
        self.store = FeatureBackfill(spark, tables)
        self.days: Days = run_days(context, pipeline, self.profile, self.store)

    @property
    def facts(self) -> dict[str, Any]:
        """What every result says of its range, and how long the step took so far."""
        return {
            "start": self.days.first.isoformat(),
            "end": self.days.last.isoformat(),
            "seconds": round(time.monotonic() - self._began, 3),
        }

    def left(self, key: str) -> dict[str, Any] | None:
        """Return what the asset's newest materialization says, if it is of this trial and range."""
        for stored in self._context.instance.fetch_materializations(asset_key(key), limit=1).records:
            found = stored.asset_materialization
            if found is None or TRIAL not in found.metadata or RESULT not in found.metadata:
                continue
            result = found.metadata[RESULT].value
            wanted = (self.profile.name, self.days.first.isoformat(), self.days.last.isoformat())
            if isinstance(result, dict) and (found.metadata[TRIAL].value, result["start"], result["end"]) == wanted:
                return dict(result)
        return None

    def staged(self) -> Staged:
        """Return the rows that engineer_features left; computed here where there are none."""
        left = self.left(ENGINEERED)
        if left is None:
            return self.store.stage(self.profile, self.days)
        return Staged(**{name: left[name] for name in Staged.__dataclass_fields__})

    @property
    def runs(self) -> list[str]:
        """This run and the runs that it repeats."""
        run = self._context.run
        return [run.run_id, *(one for one in (run.parent_run_id, run.root_run_id) if one)]

    def materialized(
        self,
        key: str,
        result: Mapping[str, Any],
        metadata: Mapping[str, Any],
        checks: list[dg.AssetCheckResult] | None = None,
    ) -> dg.MaterializeResult[Any]:
        """Return the materialization of an unpartitioned asset."""
        facts = self.facts
        shown = {"range": str(self.days), "days": len(self.days), "seconds": facts["seconds"], **metadata}
        return materialized(asset_key(key), self.profile.name, {**facts, **result}, shown, checks)


@step(
    specs=[
        spec(
            HISTORY,
            "The records that the range of days has in each silver table, and the table versions they are read from.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[silver(domain) for domain in DOMAINS],
        )
    ],
    pool="data_validation",
    backfill_policy=SINGLE_RUN,
)
def extract_historical_data(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Count the history of the range and fix the versions that all later steps read."""
    step = _Step(context, pipeline, tables, spark)
    history = step.store.history(step.profile, step.days)
    context.log.info(
        f"No feature row is due from {step.days}: nothing will be computed."
        if history.empty
        else f"{history.expected_rows} feature rows are due from {step.days}."
    )
    yield step.materialized(
        HISTORY,
        _history_result(history),
        {
            "expected_rows": history.expected_rows,
            "note": "no feature row is due in this range" if history.empty else "",
            "records": _history_table(history),
        },
    )


def _history_result(history: History) -> dict[str, Any]:
    return {
        "versions": history.versions,
        "expected_rows": history.expected_rows,
        "empty": history.empty,
        "unknown_subjects": history.unknown_subjects,
        "longest_gap_days": history.longest_gap_days,
        "records_in_range": {entry.domain: entry.in_range for entry in history.domains},
        "records_before": {entry.domain: entry.before for entry in history.domains},
        "repeated_keys": sum(entry.repeated_keys for entry in history.domains),
        "without_time": sum(entry.without_time for entry in history.domains),
    }


def _history_table(history: History) -> dg.MetadataValue:
    columns = ["table", "in range", "before", "of the trial", "patients", "days", "first", "last"]
    return markdown_table(
        columns,
        [
            (
                silver(entry.domain), entry.in_range, entry.before, entry.rows, entry.subjects, entry.days,
                None if entry.first is None else f"{entry.first:%Y-%m-%d}",
                None if entry.last is None else f"{entry.last:%Y-%m-%d}",
            )
            for entry in history.domains
        ],
    )  # fmt: skip


@step(
    specs=[
        spec(
            VALIDATION,
            "Whether the history of the range can be computed from: times, natural keys, subjects, coverage by day.",
            group=GROUP,
            kinds={"polars"},
            deps=[HISTORY],
        )
    ],
    check_specs=[TIMES, UNIQUE, SUBJECTS],
    pool="data_validation",
    backfill_policy=SINGLE_RUN,
)
def validate_historical_data(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Judge what was extracted."""
    step = _Step(context, pipeline, tables, spark)
    history = step.left(HISTORY) or _history_result(step.store.history(step.profile, step.days))
    without, repeated, unknown = (history[name] for name in ("without_time", "repeated_keys", "unknown_subjects"))
    yield step.materialized(
        VALIDATION,
        {"empty": history["empty"], "valid": not without and not repeated, "unknown_subjects": unknown},
        {
            "expected_rows": history["expected_rows"],
            "longest_gap_days": history["longest_gap_days"],
            "note": "no feature row is due in this range" if history["empty"] else "",
        },
        [
            dg.AssetCheckResult(check_name=TIMES.name, passed=not without, metadata={"records": without}),
            dg.AssetCheckResult(check_name=UNIQUE.name, passed=not repeated, metadata={"records": repeated}),
            dg.AssetCheckResult(
                check_name=SUBJECTS.name,
                passed=not unknown,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"patients": unknown},
            ),
        ],
    )


@step(
    specs=[
        spec(
            ENGINEERED,
            "The feature rows of the range, computed from history in one Spark job; they wait in "
            "`staging/patient_features` for their checks.",
            group=GROUP,
            kinds={"spark", "deltalake"},
            deps=[VALIDATION],
        )
    ],
    pool="spark_jobs",
    backfill_policy=SINGLE_RUN,
)
def engineer_features(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Compute the range; rows that an interrupted run left are taken as they are."""
    step = _Step(context, pipeline, tables, spark)
    history = step.left(HISTORY)
    staged = step.store.stage(step.profile, step.days, None if history is None else history["versions"])
    context.log.info(
        f"{staged.rows} rows of {staged.patients} patients "
        + ("computed." if staged.computed else "were there already." if staged.rows else "are due.")
    )
    yield step.materialized(
        ENGINEERED,
        {**vars(staged), "versions": dict(staged.versions), **_only("seconds", step.facts)},
        {
            "dagster/row_count": staged.rows,
            "patients": staged.patients,
            "computed": staged.computed,
            "silver_versions": dg.MetadataValue.json(dict(staged.versions)),
        },
    )


def _only(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name]}


@step(
    specs=[
        spec(
            FEATURE_CHECKS,
            "What was found in the computed rows: value rules, empty values, rows that are missing or too many.",
            group=GROUP,
            kinds={"polars"},
            deps=[ENGINEERED],
        )
    ],
    check_specs=[VALUES, ROWS, COUNT, FILLED],
    pool="data_validation",
    backfill_policy=SINGLE_RUN,
)
def validate_features(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Check the computed rows; nothing is written to either store where they are wrong."""
    step = _Step(context, pipeline, tables, spark)
    staged = step.staged()
    report = step.store.check(step.profile, step.days, staged)
    wanted = pipeline.variables().feature_count_threshold
    values = report.values
    yield step.materialized(
        FEATURE_CHECKS,
        {
            "request": staged.request,
            "valid": _acceptable(report, wanted),
            "rows": values.rows,
            "features": values.features,
            "empty_share": values.empty_share,
            "empty_features": len(values.empty_features),
            "broken_rules": [rule.name for rule in values.broken],
        },
        {
            "dagster/row_count": values.rows,
            "features": values.features,
            "empty_share": values.empty_share,
            "rules": markdown_table(
                ["rule", "checked", "broken", "holds", "features"],
                [
                    (rule.description, rule.checked, rule.broken, rule.holds, ", ".join(rule.features))
                    for rule in values.rules
                ],
            ),
        },
        [
            dg.AssetCheckResult(
                check_name=VALUES.name,
                passed=values.valid,
                metadata={"broken_rules": ", ".join(rule.name for rule in values.broken),
                          "empty_share": values.empty_share},
            ),
            dg.AssetCheckResult(
                check_name=ROWS.name,
                passed=report.complete,
                metadata={"missing": report.missing_rows, "surplus": report.surplus_rows},
            ),
            dg.AssetCheckResult(
                check_name=COUNT.name,
                passed=values.features >= wanted,
                metadata={"features": values.features, "wanted": wanted},
            ),
            dg.AssetCheckResult(
                check_name=FILLED.name,
                passed=not values.empty_features,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"empty": len(values.empty_features), "features": ", ".join(values.empty_features[:20])},
            ),
        ],
    )  # fmt: skip


def _acceptable(report: StagedReport, threshold: int) -> bool:
    return report.values.valid and report.complete and report.values.features >= threshold


@step(
    specs=[
        spec(
            PATIENT_FEATURES,
            "The days of `gold/patient_features` that a backfill has brought up to date, and the newest row of each "
            "patient in Redis.",
            group=GROUP,
            kinds={"deltalake", "redis"},
            deps=[FEATURE_CHECKS],
            metadata={"partition_column": "feature_date"},
        )
    ],
    partitions_def=PARTITIONS,
    pool="feature_engineering",
    backfill_policy=SINGLE_RUN,
)
def load_to_feature_store(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
    online: dg.ResourceParam[OnlineStore],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Write the days that differ in one commit, then the newest row of each patient to Redis."""
    step = _Step(context, pipeline, tables, spark)
    staged = step.staged()
    checked = step.left(FEATURE_CHECKS)
    if checked is None or checked["request"] != staged.request or not checked["valid"]:
        # materialized on its own
        found = step.store.check(step.profile, step.days, staged)
        if not _acceptable(found, pipeline.variables().feature_count_threshold):
            raise dg.Failure(
                "the computed features are not valid, so nothing was written: "
                + (", ".join(rule.name for rule in found.values.broken) or "too few rows, values or features")
                + "; materialize backfill/feature_checks to see the rules",
                allow_retries=False,
            )
    loaded = step.store.load(step.profile, step.days, staged, step.runs)
    newest = OfflineStore(spark, tables).newest(step.profile)
    put = online.put(newest)
    context.log.info(_what_happened(loaded, step.days))
    changes = loaded.differences
    result = {
        **step.facts,
        "rows": loaded.rows,
        "patients": loaded.patients,
        "written": loaded.written,
        "resumed": loaded.resumed,
        "version_before": loaded.version_before,
        "version": loaded.version,
        "request": loaded.request,
        "versions": dict(loaded.versions),
        "differences": changes.as_dict(),
        "online": {"patients": put.total, "written": put.written, "unchanged": put.unchanged, "older": put.older},
    }
    key = asset_key(PATIENT_FEATURES)
    for day, rows in loaded.rows_by_day.items():
        context.add_asset_metadata({"dagster/partition_row_count": rows}, asset_key=key, partition_key=day.isoformat())
    # a range leaves one event a day: what is said of the whole range goes into the last one only
    context.add_asset_metadata(
        {
            RESULT: dg.MetadataValue.json(result),
            "range": str(step.days),
            "rows": loaded.rows,
            "added_rows": changes.added,
            "changed_rows": changes.changed,
            "removed_rows": changes.removed,
            "changed_days": len(changes.days),
            "note": _what_happened(loaded, step.days),
            "delta_version": loaded.version or 0,
            "online_written": put.written,
            "online_unchanged": put.unchanged,
            "online_newer": put.older,
            "uri": tables.uri(FEATURES),
            "features": difference_table(changes.features),
        },
        asset_key=key,
        partition_key=step.days.last.isoformat(),
    )
    yield dg.MaterializeResult(asset_key=key, metadata={TRIAL: step.profile.name})


def _what_happened(loaded: Loaded, days: Days) -> str:
    changes = loaded.differences
    if changes.nothing:
        return f"Nothing changed: the stored rows from {days} are the computed ones." if loaded.rows else (
            f"There is no feature row from {days}."
        )  # fmt: skip
    return (
        f"{changes.added} rows added, {changes.changed} changed, {changes.removed} removed on {len(changes.days)} days"
        + (", written by the interrupted run." if loaded.resumed else ".")
    )


@step(
    specs=[
        spec(
            VERIFICATION,
            "What is in the feature store after the load, read back: the range, all other days, and Redis.",
            group=GROUP,
            kinds={"polars", "redis"},
            deps=[PATIENT_FEATURES],
        )
    ],
    check_specs=[STORED, UNTOUCHED, EQUAL],
    pool="feature_engineering",
    backfill_policy=SINGLE_RUN,
)
def verify_feature_store(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
    online: dg.ResourceParam[OnlineStore],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Read both stores back and compare."""
    step = _Step(context, pipeline, tables, spark)
    loaded = step.left(PATIENT_FEATURES) or {}
    stored = step.store.verify(step.profile, step.days, loaded.get("request"), loaded.get("versions"))
    # without a commit of this backfill nothing can have been touched
    since = loaded.get("version_before") if loaded.get("written") else tables.version(FEATURES)
    untouched = step.store.untouched(step.profile, step.days, since)
    compared = compare(OfflineStore(spark, tables).newest(step.profile), online)
    consistent = not compared.missing and not compared.differing
    yield step.materialized(
        VERIFICATION,
        {
            "stored_rows": stored.rows,
            "missing_rows": stored.missing,
            "surplus_rows": stored.surplus,
            "differing_rows": stored.differing,
            "other_rows": untouched.rows,
            "other_days_changed": untouched.changed_days,
            "online_checked": compared.checked,
            "online_equal": compared.equal,
            "online_newer": compared.newer,
            "consistent": stored.holds and untouched.holds and consistent,
        },
        {
            "dagster/row_count": stored.rows,
            "patients_online": compared.checked,
            "rows_of_other_days": untouched.rows,
        },
        [
            dg.AssetCheckResult(
                check_name=STORED.name,
                passed=stored.holds,
                metadata={"rows": stored.rows, "missing": stored.missing, "surplus": stored.surplus,
                          "differing": stored.differing, "values_compared": stored.compared},
            ),
            dg.AssetCheckResult(
                check_name=UNTOUCHED.name, passed=untouched.holds, metadata={"changed_days": untouched.changed_days}
            ),
            dg.AssetCheckResult(
                check_name=EQUAL.name,
                passed=consistent,
                metadata={"checked": compared.checked, "equal": compared.equal, "missing": compared.missing,
                          "newer_online": compared.newer, "differing": compared.differing},
            ),
        ],
    )  # fmt: skip


@step(
    specs=[
        spec(
            REPORT,
            "What the backfill did: rows, seconds, and before and after for each feature, as HTML and JSON in the "
            "bucket.",
            group=GROUP,
            kinds={"minio"},
            deps=[VERIFICATION],
        )
    ],
    pool="data_validation",
    backfill_policy=SINGLE_RUN,
)
def generate_backfill_report(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    spark: dg.ResourceParam[SparkTables],
    objects: dg.ResourceParam[Objects],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Put the report into the bucket and remove the staged rows."""
    step = _Step(context, pipeline, tables, spark)
    keys = (HISTORY, VALIDATION, ENGINEERED, FEATURE_CHECKS, PATIENT_FEATURES, VERIFICATION)
    parts = {key.rpartition("/")[2]: step.left(key) or {} for key in keys}
    now = datetime.now(UTC)
    seconds = {key: part["seconds"] for key, part in parts.items() if "seconds" in part}
    content: dict[str, Any] = {
        "trial": step.profile.name,
        "start": step.days.first.isoformat(),
        "end": step.days.last.isoformat(),
        "days": len(step.days),
        "at": now.isoformat(timespec="seconds"),
        "run_id": context.run.run_id,
        "seconds": seconds,
        **parts,
    }
    place = f"reports/backfill/{step.profile.name}/{step.days.first}_{step.days.last}/{now:%Y-%m-%dT%H%M%SZ}"
    as_json = objects.put(f"{place}.json", report_json(content), "application/json")
    as_html = objects.put(f"{place}.html", report_html(content), "text/html; charset=utf-8")
    step.store.discard(step.profile)
    loaded = parts["patient_features"]
    changes = loaded.get("differences", {})
    yield step.materialized(
        REPORT,
        {
            "report": as_html,
            "rows": loaded.get("rows", 0),
            **{name: changes.get(name, 0) for name in ("added_rows", "changed_rows", "removed_rows", "changed_days")},
            "total_seconds": round(sum(seconds.values()), 3),
        },
        {
            "rows": loaded.get("rows", 0),
            "total_seconds": round(sum(seconds.values()), 3),
            "html": dg.MetadataValue.path(as_html),
            "json": dg.MetadataValue.path(as_json),
            "steps": markdown_table(["step", "seconds"], seconds.items()),
            "differences": markdown_table(
                ["rows before", "rows after", "added", "changed", "removed", "days"],
                [[changes.get(name, 0) for name in ("rows_before", "rows_after", "added_rows", "changed_rows",
                                                     "removed_rows", "changed_days")]],
            ),
        },
    )  # fmt: skip
