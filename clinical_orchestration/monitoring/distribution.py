"""Whether current feature rows look like features at all: ranges, gaps, constants, and how many features there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from clinical_orchestration.monitoring.drift import Sample
    from clinical_orchestration.trials import TrialProfile

Floats = NDArray[np.float64]

MISSING_RISE = 0.3
"""A missing share above the reference's by more than this is too high."""
OUTSIDE_SHARE = 0.01
"""So many of the current values may lie outside a feature's range."""
_IQRS = 5.0
_MEASURES = ("latest", "mean", "min", "max")


@dataclass(frozen=True)
class FeatureCheck:
    """One feature's current values against what they may be; `problems` is empty for a sound feature.

    Attributes:
        low, high: the range: plausible values of the vital sign, else the reference's values and five interquartile
            ranges beyond; None without reference values, and for what moves with time in the trial.
        outside: share of the values outside of it.
        missing, missing_reference: shares of rows without a value.
        constant: one value throughout, where the reference has several.
    """

    name: str
    low: float | None
    high: float | None
    outside: float
    missing: float
    missing_reference: float
    constant: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class FeatureDistribution:
    """The checks of all features; `absent` are features of the model without any value now.

    `feature_count` is the number of features with a value in at least one of the rows.
    """

    features: tuple[FeatureCheck, ...] = field(repr=False)
    rows: int
    feature_count: int
    feature_count_threshold: int
    absent: tuple[str, ...]

    @property
    def failing(self) -> tuple[FeatureCheck, ...]:
        """Features with a problem."""
        return tuple(item for item in self.features if item.problems)

    @property
    def enough_features(self) -> bool:
        """Whether there are as many features as the platform asks for."""
        return self.feature_count >= self.feature_count_threshold

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.enough_features and not self.absent and not self.failing


def check_distribution(
    reference: Sample, current: Sample, profile: TrialProfile, feature_count_threshold: int, *, seed: int = 0
) -> FeatureDistribution:
    """Check every current row's features.

    Ranges come from all reference rows; what moves with time in the trial (:func:`.drift.ageing`) has none, where the
    current rows are later than the reference's. Gaps and constants are compared with those at the same time in the
    trial, one a subject, because some features have no value or only one value in a part of the trial.

    Args:
        reference: rows the model was trained on; its features are those that must be there.
        current: current rows with every feature of the trial.
        profile: says which values of the vital signs are plausible.
        feature_count_threshold: so many features a row must have at least (variable ``feature_count_threshold``).
        seed: which row of each subject is compared.
    """
    from clinical_orchestration.monitoring.drift import ageing, one_row_a_subject

    rng = np.random.default_rng(seed)
    selected = current.select(reference.names)
    at_that_time = reference.take(one_row_a_subject(reference, rng, current))
    moving = ageing(reference, at_that_time, selected.take(one_row_a_subject(selected, rng)), rng)
    now, whole, then = selected.values, reference.values, at_that_time.values
    gone: NDArray[np.bool_] = np.zeros(then.shape[1], dtype=bool)
    if current.rows:
        gone = np.asarray(~np.isfinite(now).any(axis=0) & np.isfinite(then).any(axis=0))
    found = [
        _check(
            name,
            then[:, number],
            now[:, number],
            plausible_range(name, profile) or ((None, None) if moving[number] else _range(whole[:, number])),
        )
        for number, name in enumerate(reference.names)
        if not gone[number]
    ]
    absent = tuple(name for number, name in enumerate(reference.names) if gone[number])
    count = int(np.isfinite(current.values).any(axis=0).sum())
    return FeatureDistribution(tuple(found), current.rows, count, feature_count_threshold, absent)


def plausible_range(feature: str, profile: TrialProfile) -> tuple[float, float] | None:
    """Return what the profile calls plausible for a feature that is a level of a vital sign; None for the others."""
    for vital, settings in profile.features.vitals.items():
        rest = feature.removeprefix(f"{vital}_")
        if rest != feature and rest.split("_", 1)[0] in _MEASURES:
            bounds = [profile.plausible[code] for code in settings.codes if code in profile.plausible]
            if bounds:
                return min(low for low, _ in bounds), max(high for _, high in bounds)
    return None


def _check(name: str, then: Floats, now: Floats, bounds: tuple[float | None, float | None]) -> FeatureCheck:
    before, values = then[np.isfinite(then)], now[np.isfinite(now)]
    missing = 1 - len(values) / len(now) if len(now) else 0.0
    missing_before = 1 - len(before) / len(then) if len(then) else 0.0
    low, high = bounds
    outside = 0.0
    if len(values) and low is not None and high is not None:
        outside = float(((values < low) | (values > high)).mean())
    constant = len(values) > 1 and bool((values == values[0]).all()) and len(np.unique(before)) > 1
    problems: list[str] = []
    if outside > OUTSIDE_SHARE:
        problems.append(f"{outside:.1%} of the values are outside {low:g} to {high:g}")
    if missing - missing_before > MISSING_RISE:
        problems.append(f"{missing:.0%} missing, {missing_before:.0%} in the reference")
    # a rare indicator may well be 0 throughout in few rows
    if constant and _unlikely_constant(before, values):
        problems.append("the same value throughout")
    return FeatureCheck(name, low, high, outside, missing, missing_before, constant, tuple(problems))


def _range(column: Floats) -> tuple[float | None, float | None]:
    values = column[np.isfinite(column)]
    if not len(values):
        return None, None
    first, third = np.quantile(values, [0.25, 0.75])
    # where most rows have one value the quartiles say nothing of the spread
    width = max(float(third - first), float(values.std()))
    return float(values.min()) - _IQRS * width, float(values.max()) + _IQRS * width


def _unlikely_constant(before: Floats, values: Floats) -> bool:
    """Return whether rows drawn from the reference would hardly (1 in 1,000) all have this value."""
    share = float((before == values[0]).mean())
    return share ** len(values) < 0.001


def result(distribution: FeatureDistribution) -> dict[str, Any]:
    """Return the checks as the JSON that later steps read."""
    return {
        "status": "ok" if distribution.passed else "failed",
        "rows": distribution.rows,
        "feature_count": distribution.feature_count,
        "feature_count_threshold": distribution.feature_count_threshold,
        "absent": list(distribution.absent),
        "failing": {item.name: list(item.problems) for item in distribution.failing},
    }
