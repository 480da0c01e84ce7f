"""What a set of feature rows is worth and how it differs from another one: frames in, facts out.

Used by backfills: values are checked before they are written, and compared with the rows that are there, so that only
days with a difference are written and a report can say what changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from clinical_orchestration.features.definitions import WINDOW_STATISTICS, feature_names, window_names

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.trials import TrialProfile

KEYS = ("patient_id", "feature_time")

TOLERANCE = 1e-9
"""Two values are equal where they differ by at most this, absolutely or relative to the larger one: Spark adds
doubles in no fixed order, so that the same records can give sums that differ in their last digits."""

MAX_EMPTY_SHARE = 0.95
"""Above this share of empty values over all features the rows say nothing of their subjects."""


# --- differences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureChange:
    """How one feature differs in the rows that both sides have.

    Attributes:
        feature: its name.
        changed: rows with another value.
        emptied: of those, rows that had a value and have none now.
        filled: of those, rows that had none and have one now.
        max_difference: largest absolute difference of two values, in the feature's unit; 0.0 where none has two.
    """

    feature: str
    changed: int
    emptied: int
    filled: int
    max_difference: float


@dataclass(frozen=True)
class Differences:
    """How feature rows differ from the ones before.

    Attributes:
        before: rows before.
        after: rows after.
        added: rows (patient and time) that are new.
        removed: rows that are no longer there.
        changed: rows that both have, with another value in at least one feature.
        days: days with a difference, sorted.
        features: one entry a feature with a difference, most changed rows first.
    """

    before: int = 0
    after: int = 0
    added: int = 0
    removed: int = 0
    changed: int = 0
    days: tuple[date, ...] = ()
    features: tuple[FeatureChange, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether both sides say the same."""
        return not self.days

    def __add__(self, other: Differences) -> Differences:
        """Return the differences of two sets of days together."""
        found: dict[str, FeatureChange] = {change.feature: change for change in self.features}
        for change in other.features:
            one = found.get(change.feature)
            found[change.feature] = (
                change
                if one is None
                else FeatureChange(
                    change.feature,
                    one.changed + change.changed,
                    one.emptied + change.emptied,
                    one.filled + change.filled,
                    max(one.max_difference, change.max_difference),
                )
            )
        return Differences(
            self.before + other.before,
            self.after + other.after,
            self.added + other.added,
            self.removed + other.removed,
            self.changed + other.changed,
            tuple(sorted({*self.days, *other.days})),
            _most_changed(found.values()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them, days as a count with the first and the last one."""
        return {
            "rows_before": self.before,
            "rows_after": self.after,
            "added_rows": self.added,
            "removed_rows": self.removed,
            "changed_rows": self.changed,
            "changed_days": len(self.days),
            "first_changed_day": self.days[0].isoformat() if self.days else None,
            "last_changed_day": self.days[-1].isoformat() if self.days else None,
            "features": [vars(change) for change in self.features],
        }


def _most_changed(changes: Iterable[FeatureChange]) -> tuple[FeatureChange, ...]:
    return tuple(sorted(changes, key=lambda change: (-change.changed, change.feature)))


def differences(before: pl.DataFrame, after: pl.DataFrame, features: Sequence[str]) -> Differences:
    """Compare feature rows with the ones before, see :data:`TOLERANCE`.

    Args:
        before: ``patient_id``, ``feature_time``, ``feature_date`` and the features as doubles; one row a patient and
            time.
        after: the same columns.
        features: the features to compare.
    """
    import polars as pl

    keys = list(KEYS)
    added = after.join(before, on=keys, how="anti")
    removed = before.join(after, on=keys, how="anti")
    both = after.join(before.drop("feature_date"), on=keys, how="inner", suffix="__before")
    old = {name: pl.col(f"{name}__before") for name in features}
    flags = both.select(
        "feature_date",
        *(
            (
                (pl.col(name).is_null() != old[name].is_null())
                | (
                    (pl.col(name) - old[name]).abs()
                    > TOLERANCE * pl.max_horizontal(pl.lit(1.0), pl.col(name).abs(), old[name].abs())
                ).fill_null(False)
            ).alias(name)
            for name in features
        ),
    )
    changed = flags.select(pl.any_horizontal(features).alias("changed"), "feature_date") if features else flags.clear()
    counts = flags.select(pl.col(list(features)).sum()).row(0) if both.height and features else ()
    touched = [name for name, count in zip(features, counts, strict=False) if count]
    details = (
        both.select(
            pl.concat_list(
                (pl.col(name).is_null() & old[name].is_not_null()).sum().cast(pl.Float64),
                (pl.col(name).is_not_null() & old[name].is_null()).sum().cast(pl.Float64),
                (pl.col(name) - old[name]).abs().max().fill_null(0.0),
            ).alias(name)
            for name in touched
        ).row(0)
        if touched
        else ()
    )
    by_name = dict(zip(features, counts, strict=False))
    rows = changed.filter("changed") if both.height and features else changed.clear()
    days: set[date] = set()
    for frame in (added, removed, rows):
        days |= set(frame["feature_date"].to_list())
    return Differences(
        before=before.height,
        after=after.height,
        added=added.height,
        removed=removed.height,
        changed=rows.height,
        days=tuple(sorted(days)),
        features=_most_changed(
            FeatureChange(name, int(by_name[name]), int(emptied), int(filled), float(largest))
            for name, (emptied, filled, largest) in zip(touched, details, strict=True)
        ),
    )


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueRule:
    """A rule over feature values and how many rows break it.

    Attributes:
        name: stable name.
        description: the rule in words.
        checked: values or rows that it looked at.
        broken: of those, the ones that break it.
        features: features with a broken value, sorted, at most ten.
    """

    name: str
    description: str
    checked: int
    broken: int
    features: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing breaks it."""
        return self.broken == 0


@dataclass(frozen=True)
class ValueReport:
    """What was found in feature rows.

    Attributes:
        rows: how many rows.
        features: how many features they have.
        empty_share: share of empty values over all features; 0.0 without rows.
        empty_features: features without any value in these rows.
        rules: the rules, in a fixed order.
    """

    rows: int
    features: int
    empty_share: float
    empty_features: tuple[str, ...] = ()
    rules: tuple[ValueRule, ...] = field(default=())

    @property
    def broken(self) -> tuple[ValueRule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.holds)

    @property
    def valid(self) -> bool:
        """Whether every rule holds and the rows are not nearly empty."""
        return not self.broken and self.empty_share <= MAX_EMPTY_SHARE


_INDICATORS = ("sex_male", "arm_placebo", "on_treatment")
_AGE = (0.0, 120.0)


def check_values(rows: pl.DataFrame, profile: TrialProfile) -> ValueReport:
    """Check feature values: finite, counts whole and not negative, statistics in order, vitals plausible.

    Plausible bounds of a vital sign are those of its test codes in the profile (``plausible``), the widest of them.

    Args:
        rows: the profile's features as doubles, and ``patient_id`` and ``feature_time``.
        profile: the trial.
    """
    names = feature_names(profile)
    if rows.is_empty():
        return ValueReport(0, len(names), 0.0)
    nulls = dict(zip(names, rows.select(names).null_count().row(0), strict=True))
    return ValueReport(
        rows=rows.height,
        features=len(names),
        empty_share=sum(nulls.values()) / (rows.height * len(names)),
        empty_features=tuple(name for name in names if nulls[name] == rows.height),
        rules=tuple(_rules(rows, profile, names)),
    )


def _rules(rows: pl.DataFrame, profile: TrialProfile, names: Sequence[str]) -> list[ValueRule]:
    import polars as pl

    settings = profile.features

    def rule(name: str, description: str, conditions: dict[str, pl.Expr]) -> ValueRule:
        """Count per feature where its condition is false; empty values break nothing."""
        if not conditions:
            return ValueRule(name, description, 0, 0)
        counts = rows.select((~condition).fill_null(False).sum().alias(key) for key, condition in conditions.items())
        broken = {key: int(count) for key, count in zip(conditions, counts.row(0), strict=True) if count}
        return ValueRule(
            name, description, rows.height * len(conditions), sum(broken.values()), tuple(sorted(broken))[:10]
        )

    windows = window_names(profile)
    counts = [n for n in names if n.endswith(("_count", "_count_ever")) or "_count_" in n or n.startswith("vital_days")]
    statistics = [(vital, window) for vital in settings.vitals for window in windows]
    bounds: dict[str, pl.Expr] = {}
    for vital, definition in settings.vitals.items():
        limits = [profile.plausible[code] for code in definition.codes if code in profile.plausible]
        if limits:
            low, high = min(limit[0] for limit in limits), max(limit[1] for limit in limits)
            values = [f"{vital}_latest", *(f"{vital}_{s}_{w}" for w in windows for s in ("mean", "min", "max"))]
            bounds |= {value: pl.col(value).is_between(low - TOLERANCE, high + TOLERANCE) for value in values}
    ordered: dict[str, pl.Expr] = {}
    for vital, window in statistics:
        lowest, mean, highest = (pl.col(f"{vital}_{statistic}_{window}") for statistic in ("min", "mean", "max"))
        slack = TOLERANCE * (1 + highest.abs())
        ordered[f"{vital}_mean_{window}"] = (lowest <= mean + slack) & (mean <= highest + slack)
    deviations = [f"{vital}_{name}_{window}" for vital, window in statistics for name in WINDOW_STATISTICS
                  if name == "std"]  # fmt: skip
    repeated = rows.height - rows.select(KEYS).n_unique()
    return [
        ValueRule("one_row_a_patient_and_time", "no patient has two rows of one time", rows.height, repeated),
        rule("finite", "every value is a finite number", {name: pl.col(name).is_finite() for name in names}),
        rule(
            "counts_are_whole", "counts are whole numbers from 0",
            {name: (pl.col(name) >= 0) & (pl.col(name) == pl.col(name).floor()) for name in counts},
        ),
        rule(
            "indicators_are_0_or_1", "indicators are 0 or 1",
            {name: pl.col(name).is_in([0.0, 1.0]) for name in _INDICATORS if name in names},
        ),
        rule("deviations_not_negative", "a standard deviation is not negative",
             {name: pl.col(name) >= 0 for name in deviations}),
        rule("statistics_in_order", "the mean of a window lies between its lowest and highest value", ordered),
        rule("vitals_plausible", "vital signs are within the bounds of the trial's profile", bounds),
        rule("age_plausible", "age is from 0 to 120 years",
             {"age_years": pl.col("age_years").is_between(*_AGE)} if "age_years" in names else {}),
    ]  # fmt: skip


# --- which rows there should be ---------------------------------------------------------------------------------------


def expected_times(vitals: pl.DataFrame, profile: TrialProfile) -> pl.DataFrame:
    """Return which feature rows there should be, as ``compute.feature_times`` defines them, reckoned without Spark.

    A second way to the same set: a join that lost a patient or a day in the computation shows against it.

    Args:
        vitals: ``patient_id``, ``event_time`` and ``received_at`` (UTC) of the trial's vital signs.
        profile: the trial.

    Returns:
        Distinct ``patient_id`` and ``feature_time``.
    """
    import polars as pl

    times = profile.features.times
    event, received = pl.col("event_time"), pl.col("received_at")
    if times.kind == "visit":
        due = event.dt.truncate("1d") + pl.duration(days=1) - pl.duration(seconds=1)
        rows = vitals.with_columns(due.alias("feature_time"))
    else:
        if times.every is None:
            raise ValueError(f"trial {profile.name}: feature times of kind interval need 'every'")
        every = int(times.every.total_seconds() * 1_000_000)
        micros = event.dt.timestamp("us")
        due = ((micros + every - 1) // every * every).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        rows = vitals.with_columns(due.alias("feature_time"), event.max().over("patient_id").alias("last"))
        rows = rows.filter(pl.col("feature_time") <= pl.col("last"))
    return rows.filter(received <= pl.col("feature_time")).select(*KEYS).unique()
