"""What should be there and is not: filled cells, measurements of attended visits, readings of each day, sites.

What is expected is learned from the trial itself. A test belongs to a visit when most of those who attended the visit
have it; a test of a monitored trial is expected as often a day as the better days of the patients have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.quality.results import RuleResult

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("patient_id", "event_time", "test_code", "visit")
"""What is needed of the measurements, besides the columns whose filling is counted."""

PLANNED_SHARE = 0.7
"""A test belongs to a visit when at least this share of those who attended it have it."""

VISIT_PATIENTS = 10
"""Visits that fewer patients attended say nothing about a plan."""

COVERAGE_TOLERANCE = 0.08
"""Largest share of expected measurements that may be missing."""

SITE_GAP = 0.10
"""A site is conspicuous when its coverage is this much below the median of the sites."""


def visit_coverage(frame: pl.DataFrame) -> pl.DataFrame:
    """Return what was expected and received of each test at each visit.

    Args:
        frame: ``patient_id, site, visit, test_code`` of one table; rows without a visit are left out.

    Returns:
        ``site, visit, test_code, expected, received`` in patients. Unscheduled visits do not count.
    """
    import polars as pl

    rows = frame.filter(
        pl.col("visit").is_not_null() & ~pl.col("visit").str.to_uppercase().str.contains("UNSCHED")
    ).select("patient_id", "site", "visit", "test_code")
    rows = rows.unique()
    attended = rows.select("patient_id", "site", "visit").unique()
    size = attended.group_by("visit").agg(pl.len().alias("attended")).filter(pl.col("attended") >= VISIT_PATIENTS)
    plan = (
        rows.group_by("visit", "test_code")
        .agg(pl.len().alias("patients"))
        .join(size, on="visit")
        .filter(pl.col("patients") >= PLANNED_SHARE * pl.col("attended"))
        .select("visit", "test_code")
    )
    expected = attended.join(plan, on="visit")
    found = expected.join(
        rows.with_columns(received=pl.lit(True)), on=["patient_id", "site", "visit", "test_code"], how="left",
        nulls_equal=True,
    )  # fmt: skip
    return (
        found.group_by("site", "visit", "test_code")
        .agg(pl.len().alias("expected"), pl.col("received").is_not_null().sum().alias("received"))
        .sort("site", "visit", "test_code", nulls_last=True)
    )


def daily_coverage(frame: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Return what was expected and received of each test a day, for trials that are monitored on a regular grid.

    Args:
        frame: ``patient_id, event_time, test_code`` of one table.
        spans: ``patient_id, site, first, last``: first and last record of each patient in any table. The days between
            them count, the first and the last do not, because they are parts of days.

    Returns:
        ``site, visit`` (the day, for one shape with :func:`visit_coverage`), ``test_code, expected, received`` in
        readings; more than expected counts as expected.
    """
    import polars as pl

    days = (
        spans.with_columns(
            first=pl.col("first").dt.truncate("1d") + pl.duration(days=1),
            last=pl.col("last").dt.truncate("1d") - pl.duration(days=1),
        )
        .filter(pl.col("first") <= pl.col("last"))
        .with_columns(day=pl.datetime_ranges("first", "last", "1d"))
        .explode("day")
        .select("patient_id", "site", "day")
    )
    counts = (
        frame.with_columns(day=pl.col("event_time").dt.truncate("1d"))
        .group_by("patient_id", "test_code", "day")
        .agg(pl.len().alias("received"))
    )
    # as often as the better days of the patients: the others are what is looked for
    usual = counts.group_by("test_code").agg(
        pl.col("received").quantile(0.75, interpolation="nearest").cast(pl.Int64).alias("expected")
    )
    full = days.join(usual, how="cross").join(counts, on=["patient_id", "test_code", "day"], how="left")
    full = full.with_columns(pl.min_horizontal(pl.col("received").fill_null(0), "expected").alias("received"))
    return (
        full.group_by("site", pl.col("day").dt.strftime("%Y-%m-%d").alias("visit"), "test_code")
        .agg(pl.col("expected").sum(), pl.col("received").sum())
        .sort("site", "visit", "test_code", nulls_last=True)
    )


def spans(*frames: pl.DataFrame) -> pl.DataFrame:
    """Return ``patient_id, first, last``: first and last time of each patient over the frames' ``event_time``."""
    import polars as pl

    rows = pl.concat([frame.select("patient_id", "event_time") for frame in frames])
    return rows.group_by("patient_id").agg(
        pl.col("event_time").min().alias("first"), pl.col("event_time").max().alias("last")
    )


def coverage_by(coverage: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """Return ``expected, received, share`` of a coverage by some of its columns, lowest share first."""
    import polars as pl

    return (
        coverage.group_by(*keys)
        .agg(pl.col("expected").sum(), pl.col("received").sum())
        .with_columns(share=pl.col("received") / pl.col("expected"))
        .sort("share", *keys, nulls_last=True)
    )


def coverage_rules(table: str, coverage: pl.DataFrame) -> list[RuleResult]:
    """Judge a coverage: as a whole (DQ-COMP-02), and each site against the others (DQ-COMP-03)."""
    import polars as pl

    expected, received = int(coverage["expected"].sum() or 0), int(coverage["received"].sum() or 0)
    tests = coverage_by(coverage, "test_code").filter(pl.col("share") < 1 - COVERAGE_TOLERANCE)
    whole = RuleResult(
        "expected_measurements_arrived",
        "Measurements that belong to an attended visit, or to a day of monitoring, arrived",
        blocking=False,
        checked=expected,
        failed=expected - received,
        tolerance=COVERAGE_TOLERANCE,
        rule="DQ-COMP-02",
        table=table,
        groups={str(test): expected - received for test, expected, received, _ in tests.iter_rows()},
    )
    sites = coverage_by(coverage.filter(pl.col("site").is_not_null()), "site").filter(pl.col("expected") >= 20)
    middle = sites["share"].median() if sites.height >= 3 else None
    limit = (float(middle) if isinstance(middle, (int, float)) else 0.0) - SITE_GAP
    low = sites.filter(pl.col("share") < limit)
    by_site = RuleResult(
        "sites_deliver_alike",
        f"No site's coverage is more than {SITE_GAP:.0%} below the median of the sites",
        blocking=False,
        checked=sites.height,
        failed=low.height,
        rule="DQ-COMP-03",
        table=table,
        groups={str(site): expected - received for site, expected, received, _ in low.iter_rows()},
    )
    return [whole, by_site]


def filled_rule(table: str, filled: dict[str, float], rows: int, tolerance: float = 0.05) -> RuleResult:
    """Judge the share of cells with a value in the columns that should have one (DQ-COMP-01)."""
    empty = {name: round((1 - share) * rows) for name, share in filled.items() if share < 1 - tolerance}
    return RuleResult(
        "columns_are_filled",
        f"Each expected column has a value in at least {1 - tolerance:.0%} of the rows",
        blocking=False,
        checked=len(filled),
        failed=len(empty),
        rule="DQ-COMP-01",
        table=table,
        groups=dict(sorted(empty.items(), key=lambda item: -item[1])),
    )


def tests_without_values(frame: pl.DataFrame, table: str) -> RuleResult:
    """Every test has results: none of them is always empty (DQ-COMP-04). Texts count as results."""
    import polars as pl

    has = pl.col("value").is_not_null()
    if "text_value" in frame.columns:
        has = has | pl.col("text_value").is_not_null()
    tests = frame.group_by("test_code").agg(has.sum().alias("results"), pl.len().alias("rows"))
    empty = tests.filter(pl.col("results") == 0)
    return RuleResult(
        "tests_have_results",
        "Each test has at least one result",
        blocking=False,
        checked=tests.height,
        failed=empty.height,
        rule="DQ-COMP-04",
        table=table,
        groups=dict(zip(empty["test_code"].to_list(), empty["rows"].to_list(), strict=True)),
    )
