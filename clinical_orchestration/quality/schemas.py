"""What a row of each silver table must look like, written once.

:data:`REQUIRED_COLUMNS` and :data:`ROW_RULES` say it as data. :func:`.rules.check_table` evaluates them with nothing
but polars at the end of each ingestion; :func:`silver_schema` turns the same data into a pandera schema for whoever
wants to validate a frame (the schema step of the quality pipeline, backfills, notebooks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from clinical_orchestration.quality.results import SAMPLE, RuleResult
from clinical_orchestration.tables import SILVER_COLUMNS
from clinical_orchestration.transforms.messages import SEVERITIES
from clinical_orchestration.transforms.sdtm import MAX_AGE_YEARS
from clinical_orchestration.transforms.units import VITAL_UNITS

if TYPE_CHECKING:
    import pandera.polars as pandera
    import polars as pl

KEY_COLUMNS = (
    "trial", "patient_id", "event_time", "received_at", "source", "source_position", "ingested_at", "record_key",
    "content_hash",
)  # fmt: skip

REQUIRED_COLUMNS: dict[str, tuple[str, ...]] = {
    "patient_vitals": ("test_code", "value", "unit"),
    "lab_results": ("test_code",),
    "medications": ("drug_name", "start_precision"),
    "adverse_events": ("event_type", "onset_precision"),
    "subjects": ("screen_failure",),
}
"""Columns, besides the key ones, that no accepted row may leave empty."""

EXPECTED_COLUMNS: dict[str, tuple[str, ...]] = {
    "patient_vitals": ("original_value", "original_unit"),
    "lab_results": ("original_value", "test_name"),
    "medications": ("dose", "dose_unit", "route", "frequency"),
    "adverse_events": ("severity",),
    "subjects": ("age_years", "sex", "site", "arm"),
}
"""Columns that are usually filled: they count for completeness, and an empty cell is no error."""

FILLED = "required_columns_are_filled"
TYPED = "columns_have_their_types"


@dataclass(frozen=True)
class RowRule:
    """One statement about each row of a table.

    Attributes:
        name: the statement, in snake_case.
        description: the same for people.
        column: the column that the statement is mainly about.
        wrong: makes the polars expression that is true for rows which break the rule; never null.
    """

    name: str
    description: str
    column: str
    wrong: Callable[[], pl.Expr]


def _nonstandard_vital() -> pl.Expr:
    import polars as pl

    units = {code: rule.standard for code, rule in VITAL_UNITS.items()}
    standard = pl.col("test_code").replace_strict(units, default=None, return_dtype=pl.String)
    return ~pl.col("value").is_finite().fill_null(False) | (
        standard.is_not_null() & (pl.col("unit") != standard).fill_null(True)
    )


def _no_lab_result() -> pl.Expr:
    import polars as pl

    has_number = pl.col("value").is_finite().fill_null(False)
    has_text = pl.col("text_value").is_not_null() & pl.col("value").is_null()
    return ~(has_number | has_text)


def _unknown_severity() -> pl.Expr:
    import polars as pl

    return pl.col("severity").is_not_null() & ~pl.col("severity").is_in(list(SEVERITIES)).fill_null(False)


def _ends_before(start: str) -> Callable[[], pl.Expr]:
    def wrong() -> pl.Expr:
        import polars as pl

        return (pl.col("end_time") < pl.col(start)).fill_null(False)

    return wrong


def _impossible_age() -> pl.Expr:
    import polars as pl

    return pl.col("age_years").is_not_null() & ~pl.col("age_years").is_between(0, MAX_AGE_YEARS).fill_null(False)


_ORDER = "Nothing ends before it starts"
ROW_RULES: dict[str, tuple[RowRule, ...]] = {
    "patient_vitals": (
        RowRule(
            "vitals_have_standard_units",
            "Vital signs are finite and in their standard unit",
            "unit",
            _nonstandard_vital,
        ),
    ),
    "lab_results": (
        RowRule("lab_results_have_a_result", "Each result is a finite number or a text", "value", _no_lab_result),
    ),
    "medications": (RowRule("periods_end_after_they_start", _ORDER, "end_time", _ends_before("start_time")),),
    "adverse_events": (
        RowRule("severities_are_grades", "Severity is grade_1 to grade_5", "severity", _unknown_severity),
        RowRule("periods_end_after_they_start", _ORDER, "end_time", _ends_before("event_time")),
    ),
    "subjects": (RowRule("ages_are_possible", "Ages are from 0 to 120 years", "age_years", _impossible_age),),
}
"""The rules of each silver table that one row alone can break."""


def is_blank(name: str, text: bool) -> pl.Expr:
    """Return the expression that is true where a column is null or, being text, blank."""
    import polars as pl

    empty = pl.col(name).is_null()
    return empty | (pl.col(name).str.strip_chars() == "").fill_null(False) if text else empty


@cache
def silver_schema(domain: str) -> pandera.DataFrameSchema:
    """Return the pandera schema of a silver table; further columns are allowed.

    The message of each check is the rule's name.

    Raises:
        KeyError: there is no such table.
    """
    import pandera.polars as pandera

    required = {*KEY_COLUMNS, *REQUIRED_COLUMNS[domain]}
    columns = {}
    for name, kind in SILVER_COLUMNS[domain].items():
        checks = []
        if name in required and kind == "string":
            checks.append(pandera.Check(_holds(partial(is_blank, name, text=True)), error=FILLED))
        checks += [
            pandera.Check(_holds(rule.wrong), error=rule.name) for rule in ROW_RULES[domain] if rule.column == name
        ]
        columns[name] = pandera.Column(_dtype(kind), checks=checks, nullable=name not in required)
    return pandera.DataFrameSchema(columns, strict=False, name=f"silver/{domain}")


def _dtype(kind: str) -> Any:
    import polars as pl

    types: dict[str, Any] = {
        "string": pl.String,
        "double": pl.Float64,
        "boolean": pl.Boolean,
        "timestamp": pl.Datetime("us", "UTC"),
    }
    return types[kind]


def _holds(wrong: Callable[[], pl.Expr]) -> Callable[[Any], pl.LazyFrame]:
    def check(data: Any) -> pl.LazyFrame:
        lazy: pl.LazyFrame = data.lazyframe
        return lazy.select(~wrong())

    return check


def validate_schema(domain: str, frame: pl.DataFrame) -> list[RuleResult]:
    """Validate a silver frame with its pandera schema and count failing rows by rule.

    Args:
        domain: the table.
        frame: its rows. A missing column, or one of another type, is a result and no error.

    Returns:
        Types, filled columns and each row rule, in this order. Values are never part of a result.
    """
    import pandera.polars as pandera

    rules = {
        TYPED: ("DQ-SCH-01", "Every column is there and of its type"),
        FILLED: ("DQ-SCH-02", "Key and required columns have a value in every row"),
        **{rule.name: ("DQ-SCH-03", rule.description) for rule in ROW_RULES[domain]},
    }
    rows: dict[str, set[int]] = {name: set() for name in rules}
    wrong_columns: set[str] = set()
    try:
        silver_schema(domain).validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        for case in errors.failure_cases.select("column", "check", "index", "failure_case").iter_rows(named=True):
            check, index = str(case["check"]), case["index"]
            if check == "column_in_dataframe":
                wrong_columns.add(str(case["failure_case"]))
            elif check.startswith("dtype("):
                wrong_columns.add(str(case["column"]))
            elif check == "not_nullable" and str(case["failure_case"]).lower() == "nan":
                continue  # no number, but no empty cell either: the rules of the table judge it
            elif index is not None:
                rows[FILLED if check == "not_nullable" else check].add(int(index))
    results = []
    for name, (rule, description) in rules.items():
        typed = name == TYPED
        failing = sorted(rows[name])
        positions = (
            tuple(frame.get_column("source_position").gather(failing[:SAMPLE]).cast(str).fill_null("").to_list())
            if failing and "source_position" in frame.columns
            else ()
        )
        results.append(
            RuleResult(
                name,
                description,
                blocking=True,
                checked=len(SILVER_COLUMNS[domain]) if typed else frame.height,
                failed=len(wrong_columns) if typed else len(failing),
                rule=rule,
                table=domain,
                positions=positions,
                groups=dict.fromkeys(sorted(wrong_columns), 1) if typed else {},
            )
        )
    return results


def contract_versions(
    versions: dict[str | None, int], wanted: str, table: str, supported: tuple[str, ...]
) -> RuleResult:
    """Compare the contract versions that messages say with the version the platform publishes.

    Args:
        versions: version in the message (None: it says none, which means the newest) -> messages.
        wanted: variable ``clinical_data_schema_version``.
        table: the bronze table.
        supported: versions that the decoder understands.

    Returns:
        Messages of another version fail. Within :data:`supported` they were accepted: a few of them, such as those
        of a source that has not moved on yet, are a warning; unknown versions are in quarantine already.
    """
    others = {str(name): count for name, count in versions.items() if name is not None and str(name) != wanted}
    return RuleResult(
        "messages_follow_the_contract_version",
        f"Messages are of contract version {wanted} (understood: {', '.join(supported)})",
        blocking=False,
        checked=sum(versions.values()),
        failed=sum(others.values()),
        tolerance=0.02,
        rule="DQ-SCH-04",
        table=table,
        groups=dict(sorted(others.items(), key=lambda item: -item[1])),
    )
