"""Rules over whole silver tables, as blocking or warning checks, and a quality score a table.

A rule says what share of its rows may fail. Decoding already rejects single bad records; these rules find what only
a table shows (mixed units, orphaned patients), and a decoder or writer that no longer does its work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from clinical_orchestration.quality.results import RuleResult
from clinical_orchestration.quality.schemas import (
    EXPECTED_COLUMNS,
    FILLED,
    KEY_COLUMNS,
    REQUIRED_COLUMNS,
    ROW_RULES,
    is_blank,
)
from clinical_orchestration.tables import SILVER_COLUMNS
from clinical_orchestration.transforms.messages import FUTURE_TOLERANCE
from clinical_orchestration.transforms.units import LAB_UNITS

__all__ = ["EXPECTED_COLUMNS", "KEY_COLUMNS", "REQUIRED_COLUMNS", "RuleResult", "TableQuality", "check_table"]

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class TableQuality:
    """All rules' results for one table, and its score.

    Attributes:
        domain: the silver table.
        rows: its rows.
        results: one a rule.
        completeness: column -> share of rows with a value, for required and expected columns.
        acceptance_rate: share of the table's records that were not quarantined.
    """

    domain: str
    rows: int
    results: tuple[RuleResult, ...]
    completeness: dict[str, float] = field(default_factory=dict)
    acceptance_rate: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether every blocking rule passed."""
        return all(result.passed for result in self.results if result.blocking)

    @property
    def failures(self) -> tuple[RuleResult, ...]:
        """The rules that did not pass, blocking or not."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def score(self) -> float:
        """Quality from 0 to 1: mean completeness times mean validity of the rules times the acceptance rate.

        An empty table scores 1.0: nothing in it is wrong. Use the number of rows to find tables that should not be
        empty.
        """
        filled = list(self.completeness.values())
        complete = sum(filled) / len(filled) if filled else 1.0
        valid = sum(1.0 - result.failed_share for result in self.results) / len(self.results) if self.results else 1.0
        return complete * valid * self.acceptance_rate


def check_table(
    domain: str,
    frame: pl.DataFrame,
    *,
    now: datetime | None = None,
    subjects: pl.DataFrame | None = None,
    acceptance_rate: float = 1.0,
) -> TableQuality:
    """Apply every rule of a silver table.

    Args:
        domain: silver table, one of :data:`clinical_orchestration.tables.DOMAINS`.
        frame: its rows, all columns.
        now: moment after which times are in the future, aware; None is the present.
        subjects: silver ``subjects``; adds the rule that patients are known, where it has rows.
        acceptance_rate: from the accounting, for the score.

    Raises:
        ValueError: `frame` lacks a column of the table.
    """
    missing = [name for name in SILVER_COLUMNS[domain] if name not in frame.columns]
    if missing:
        raise ValueError(f"silver {domain} lacks the columns {', '.join(missing)}")
    now = now or datetime.now(UTC)
    results = [
        required_columns_are_filled(domain, frame),
        times_are_not_in_the_future(frame, now),
        records_have_one_position(frame),
        *(_result(rule.name, rule.description, frame, rule.wrong(), blocking=True) for rule in ROW_RULES[domain]),
        *(rule(frame) for rule in _DOMAIN_RULES[domain]),
    ]
    if subjects is not None and subjects.height and domain != "subjects":
        results.append(patients_are_known(frame, subjects))
    return TableQuality(domain, frame.height, tuple(results), completeness(domain, frame), acceptance_rate)


def completeness(domain: str, frame: pl.DataFrame) -> dict[str, float]:
    """Return the share of rows with a value, for the columns that should have one; 1.0 in an empty table."""
    columns = (*KEY_COLUMNS, *REQUIRED_COLUMNS[domain], *EXPECTED_COLUMNS[domain])
    if not frame.height:
        return dict.fromkeys(columns, 1.0)
    return {name: 1.0 - frame.get_column(name).null_count() / frame.height for name in columns}


def required_columns_are_filled(domain: str, frame: pl.DataFrame) -> RuleResult:
    """Every row has its key columns and the table's required ones, and no text among them is blank."""
    import polars as pl

    empty = pl.lit(False)
    for name in (*KEY_COLUMNS, *REQUIRED_COLUMNS[domain]):
        empty = empty | is_blank(name, text=frame.schema[name] == pl.String)
    return _result(FILLED, "Key and required columns have a value in every row", frame, empty, blocking=True)


def times_are_not_in_the_future(
    frame: pl.DataFrame, now: datetime, tolerance: timedelta = FUTURE_TOLERANCE
) -> RuleResult:
    """No event or receipt lies after `now` (but for `tolerance`)."""
    import polars as pl

    limit = pl.lit(now + tolerance)
    late = (pl.col("event_time") > limit).fill_null(False) | (pl.col("received_at") > limit).fill_null(False)
    return _result("times_are_not_in_the_future", "No record lies in the future", frame, late, blocking=True)


def records_have_one_position(frame: pl.DataFrame) -> RuleResult:
    """A record key belongs to one record: the same observation was not accepted twice."""
    import polars as pl

    keys = frame.group_by("record_key").agg(pl.struct("trial", "source_position").n_unique().alias("positions"))
    return RuleResult(
        "records_are_unique",
        "The same observation was accepted once",
        blocking=True,
        checked=keys.height,
        failed=keys.filter(pl.col("positions") > 1).height,
    )


def patients_are_known(frame: pl.DataFrame, subjects: pl.DataFrame, tolerance: float = 0.05) -> RuleResult:
    """Patients of the table have a row in ``subjects`` of their trial; counted by patient."""
    key = ["trial", "patient_id"]
    patients = frame.select(key).unique()
    unknown = patients.join(subjects.select(key).unique(), on=key, how="anti")
    return RuleResult(
        "patients_are_known",
        "Patients have a record in subjects",
        blocking=False,
        checked=patients.height,
        failed=unknown.height,
        tolerance=tolerance,
    )


def systolic_is_above_diastolic(frame: pl.DataFrame, tolerance: float = 0.01) -> RuleResult:
    """Of one record or visit reading, the systolic pressure is above the diastolic one."""
    import polars as pl

    key = ["trial", "patient_id", "event_time", "time_point"]
    by_code = {
        code: frame.filter(pl.col("test_code") == code).group_by(key).agg(pl.col("value").mean().alias(code))
        for code in ("SYSBP", "DIABP")
    }
    pairs = by_code["SYSBP"].join(by_code["DIABP"], on=key, how="inner", nulls_equal=True)
    return RuleResult(
        "systolic_is_above_diastolic",
        "Systolic pressure is above diastolic pressure",
        blocking=False,
        checked=pairs.height,
        failed=pairs.filter(pl.col("SYSBP") <= pl.col("DIABP")).height,
        tolerance=tolerance,
    )


def lab_tests_have_one_unit(frame: pl.DataFrame, tolerance: float = 0.01) -> RuleResult:
    """Within a trial, a known laboratory test is in its standard unit, any other in the unit most of its rows have."""
    import polars as pl

    units = {code: rule.standard for code, rule in LAB_UNITS.items()}
    numeric = frame.filter(pl.col("value").is_not_null())
    standard = pl.col("test_code").replace_strict(units, default=None, return_dtype=pl.String)
    usual = pl.col("unit").mode().first().over("trial", "test_code")
    wrong = pl.col("unit").is_not_null() & (pl.col("unit") != pl.coalesce(standard, usual)).fill_null(False)
    return _result(
        "lab_tests_have_one_unit",
        "The results of a test share one unit",
        numeric,
        wrong,
        blocking=False,
        tolerance=tolerance,
    )


def subjects_have_one_study(frame: pl.DataFrame) -> RuleResult:
    """The subjects of a trial are of one study; counted by trial."""
    import polars as pl

    trials = frame.group_by("trial").agg(pl.col("study_id").drop_nulls().n_unique().alias("studies"))
    return RuleResult(
        "subjects_have_one_study",
        "The subjects of a trial are of one study",
        blocking=False,
        checked=trials.height,
        failed=trials.filter(pl.col("studies") > 1).height,
    )


def _result(
    name: str, description: str, frame: pl.DataFrame, wrong: pl.Expr, *, blocking: bool, tolerance: float = 0.0
) -> RuleResult:
    failed = frame.select(wrong.sum()).item() if frame.height else 0
    return RuleResult(name, description, blocking, checked=frame.height, failed=int(failed or 0), tolerance=tolerance)


_DOMAIN_RULES: dict[str, tuple[Callable[[pl.DataFrame], RuleResult], ...]] = {
    "patient_vitals": (systolic_is_above_diastolic,),
    "lab_results": (lab_tests_have_one_unit,),
    "medications": (),
    "adverse_events": (),
    "subjects": (subjects_have_one_study,),
}
