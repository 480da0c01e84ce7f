"""The proof that every bronze record ended in exactly one place: accepted, duplicate or quarantined.

It is made from the records' positions, never by subtracting counts: a lost record and a doubled one do not cancel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

SAMPLE = 10
"""How many positions of each kind of violation a report names."""

OUTCOMES = ("accepted", "duplicates", "quarantined")


@dataclass(frozen=True)
class Violation:
    """One way in which the accounts do not balance.

    Attributes:
        kind: ``missing`` (in bronze, nowhere else), ``double_counted`` (in more than one outcome, or twice in
            duplicates or quarantine), ``unknown`` (in an outcome, not in bronze), ``repeated_in_bronze``.
        count: positions concerned.
        positions: up to :data:`SAMPLE` of them, sorted.
    """

    kind: str
    count: int
    positions: tuple[str, ...]


@dataclass(frozen=True)
class AccountingReport:
    """The accounts of one domain; counts are distinct positions (a wide message's several silver rows are one)."""

    domain: str
    bronze: int
    accepted: int
    duplicates: int
    quarantined: int
    violations: tuple[Violation, ...] = ()

    @property
    def balanced(self) -> bool:
        """Whether every bronze position is in exactly one outcome, and nothing else is."""
        return not self.violations

    @property
    def acceptance_rate(self) -> float:
        """Share of bronze positions that are not quarantined; 1.0 for an empty table."""
        return 1.0 if not self.bronze else 1.0 - self.quarantined / self.bronze

    def metadata(self) -> dict[str, int | float | str]:
        """Return counts, and a line a violation, for a run's metadata. Positions are no patient data."""
        lines = {
            violation.kind: f"{violation.count}: {', '.join(violation.positions)}" for violation in self.violations
        }
        return {
            "bronze": self.bronze,
            "accepted": self.accepted,
            "duplicates": self.duplicates,
            "quarantined": self.quarantined,
            "acceptance_rate": self.acceptance_rate,
            **lines,
        }


Positions = Any
"""A frame or lazy frame with ``source_position`` (and ``trial``, where positions of several trials stand together), a
polars series, an Arrow table or array, or an iterable of texts."""


def account(
    domain: str, bronze: Positions, accepted: Positions, duplicates: Positions, quarantined: Positions
) -> AccountingReport:
    """Compare the positions of one domain's bronze table with those of the three outcomes.

    Args:
        domain: name for the report.
        bronze: all positions of the bronze table.
        accepted: positions in silver; several rows of one position are one record.
        duplicates: positions in ``quarantine/duplicates`` of this domain.
        quarantined: positions in ``quarantine/records`` of this domain.

    Raises:
        ValueError: a frame has no column ``source_position``.
    """
    import polars as pl

    raw = _frame(bronze)
    tables = {
        "accepted": _frame(accepted).unique(),
        "duplicates": _frame(duplicates),
        "quarantined": _frame(quarantined),
    }
    key = ["trial", "source_position"]
    outcomes = pl.concat([frame.with_columns(outcome=pl.lit(name)) for name, frame in tables.items()])
    counted = outcomes.group_by(key).agg(pl.len().alias("times"))
    bronze_counted = raw.group_by(key).agg(pl.len().alias("times"))
    candidates = {
        "missing": bronze_counted.join(counted, on=key, how="anti", nulls_equal=True),
        "double_counted": counted.filter(pl.col("times") > 1),
        "unknown": counted.join(bronze_counted, on=key, how="anti", nulls_equal=True),
        "repeated_in_bronze": bronze_counted.filter(pl.col("times") > 1),
    }
    return AccountingReport(
        domain=domain,
        bronze=bronze_counted.height,
        **{name: tables[name].unique().height for name in OUTCOMES},
        violations=tuple(_violation(kind, found) for kind, found in candidates.items() if found.height),
    )


def _violation(kind: str, found: pl.DataFrame) -> Violation:
    sample = found.get_column("source_position").sort().head(SAMPLE).to_list()
    return Violation(kind, found.height, tuple("(no position)" if item is None else item for item in sample))


def _frame(positions: Positions) -> pl.DataFrame:
    """Return the two key columns, whatever form they came in. Without trials, all stand under the same one."""
    import polars as pl

    if isinstance(positions, pl.LazyFrame):
        positions = positions.collect()
    if isinstance(positions, pl.Series):
        positions = pl.DataFrame({"source_position": positions})
    elif not isinstance(positions, pl.DataFrame):
        if hasattr(positions, "schema") and hasattr(positions, "column_names"):
            positions = pl.DataFrame(pl.from_arrow(positions))
        elif hasattr(positions, "to_pylist"):
            positions = pl.DataFrame({"source_position": positions.to_pylist()}, schema={"source_position": pl.String})
        elif isinstance(positions, Iterable):
            positions = pl.DataFrame({"source_position": list(positions)}, schema={"source_position": pl.String})
    frame: pl.DataFrame = positions
    if "source_position" not in frame.columns:
        raise ValueError("the accounts need a column source_position")
    trial = pl.col("trial") if "trial" in frame.columns else pl.lit("")
    return frame.select(trial.cast(pl.String).alias("trial"), pl.col("source_position").cast(pl.String))
