"""Ranges, gaps, constants and the number of features."""

from dataclasses import replace

import numpy as np
import pytest

from clinical_orchestration.monitoring.distribution import check_distribution, plausible_range, result
from clinical_orchestration.monitoring.drift import Sample
from clinical_orchestration.trials import load_trial

PILOT = load_trial("cdisc-pilot")
NAMES = ("temperature_latest", "temperature_std_7d", "rare", "count")


def rows(seed: int = 0, count: int = 400) -> Sample:
    rng = np.random.default_rng(seed)
    values = np.column_stack(
        [rng.normal(36.8, 0.4, count), rng.exponential(0.3, count), rng.random(count) < 0.001, rng.poisson(3, count)]
    ).astype(float)
    return Sample(NAMES, values, np.arange(count))


def changed(column: int, values: object, share: float = 1.0) -> Sample:
    now = rows(1)
    new = now.values.copy()
    new[: int(share * now.rows), column] = values
    return replace(now, values=new)


def test_sound_rows_pass() -> None:
    found = check_distribution(rows(), rows(1), PILOT, 4)
    assert found.passed
    assert result(found)["status"] == "ok"


@pytest.mark.parametrize(
    ("current", "name", "words"),
    [
        (changed(0, 98.6, 0.05), "temperature_latest", "outside 32 to 43"),
        (changed(1, 1000.0, 0.05), "temperature_std_7d", "outside"),
        (changed(0, np.nan, 0.5), "temperature_latest", "missing"),
        (changed(3, 3.0), "count", "same value"),
    ],
    ids=["fahrenheit", "far beyond the reference", "gaps", "stuck"],
)
def test_unsound_features_are_named_with_their_problem(current: Sample, name: str, words: str) -> None:
    found = check_distribution(rows(), current, PILOT, 4)
    (failing,) = found.failing
    assert failing.name == name
    assert words in " ".join(failing.problems)
    assert not found.passed


def test_a_rare_indicator_may_be_zero_throughout() -> None:
    assert check_distribution(rows(), changed(2, 0.0), PILOT, 4).passed


def test_a_feature_without_any_value_is_absent_and_not_counted() -> None:
    found = check_distribution(rows(), changed(3, np.nan), PILOT, 4)
    assert found.absent == ("count",)
    assert found.feature_count == 3
    assert not found.enough_features
    assert result(found)["status"] == "failed"


def test_a_column_that_is_gone_is_absent() -> None:
    assert check_distribution(rows(), rows(1).select(NAMES[:3]), PILOT, 1).absent == ("count",)


def test_features_that_a_part_of_the_trial_does_not_have_are_no_problem() -> None:
    """The first rows have a value that no later row has: neither absent nor constant later on."""
    rng = np.random.default_rng(0)
    numbers, days = np.repeat(np.arange(50), 10), np.tile(np.arange(10.0), 50)
    first = np.where(days < 3, rng.random(500), np.nan)
    until = np.where(days < 3, rng.integers(0, 2, 500), 2.0)
    reference = Sample(("first", "until"), np.column_stack([first, until]), numbers, days)
    late = reference.take(np.flatnonzero(days > 7))
    assert check_distribution(reference, replace(late, days=late.days + 10), PILOT, 1).passed


def test_what_grows_with_the_days_in_the_trial_has_no_range_beyond_the_reference() -> None:
    rng = np.random.default_rng(3)
    numbers = np.repeat(np.arange(100), 10)

    def side(first_day: float, level: float = 0.0) -> Sample:
        days = np.tile(np.arange(10.0) + first_day, 100)
        events = np.repeat(rng.poisson(0.3, 100), 10)
        return Sample(("grows", "level"), np.column_stack([events * days, rng.normal(level, 1, 1000)]), numbers, days)

    assert check_distribution(side(0), side(60), PILOT, 1).passed
    assert [item.name for item in check_distribution(side(0), side(60, 20.0), PILOT, 1).failing] == ["level"]
    # on the same days of the trial, the same values are out of range
    late = side(60)
    assert not check_distribution(side(0), Sample(late.names, late.values, numbers, late.days - 60), PILOT, 1).passed


def test_no_rows_break_nothing() -> None:
    nobody = Sample(NAMES, np.empty((0, 4)), np.empty(0, dtype=np.int64))
    assert not check_distribution(rows(), nobody, PILOT, 4).enough_features


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("temperature_latest", (32, 43)), ("temperature_mean_7d", (32, 43)), ("temperature_std_7d", None),
     ("heart_rate_count_90d", None), ("systolic_bp_max_30d", (50, 260)), ("age_years", None)],
)  # fmt: skip
def test_levels_of_vital_signs_have_the_profile_s_range(feature: str, expected: tuple[float, float] | None) -> None:
    assert plausible_range(feature, PILOT) == expected
