"""Comparison and rules of feature rows, and which rows there should be."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.features.changes import (
    MAX_EMPTY_SHARE,
    Differences,
    FeatureChange,
    check_values,
    differences,
    expected_times,
)
from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.stores.feature_backfill import Days, _from_text, _to_text, days_of_conf, request_id
from clinical_orchestration.trials import load_trial
from clinical_orchestration.trials.profile import FeatureTimes

if TYPE_CHECKING:
    import polars as pl

PILOT = load_trial("cdisc-pilot")
START = datetime(2024, 2, 27, tzinfo=UTC)
NAMES = ("a", "b")

Rows = dict[tuple[str, int], tuple[float | None, float | None]]


def frame(rows: Rows) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, Any] = {
        "patient_id": [patient for patient, _ in rows],
        "feature_time": [START + timedelta(days=day) for _, day in rows],
        "feature_date": [(START + timedelta(days=day)).date() for _, day in rows],
        "a": [values[0] for values in rows.values()],
        "b": [values[1] for values in rows.values()],
    }
    types = {"patient_id": pl.String, "feature_time": pl.Datetime("us", "UTC"), "feature_date": pl.Date,
             "a": pl.Float64, "b": pl.Float64}  # fmt: skip
    return pl.DataFrame(columns, schema=types)


def test_what_differs_is_counted_by_row_day_and_feature() -> None:
    before = frame({("p", 0): (1.0, None), ("p", 1): (2.0, 3.0), ("q", 1): (5.0, 5.0)})
    after = frame({("p", 0): (1.5, 4.0), ("p", 1): (2.0, None), ("r", 2): (None, None)})
    found = differences(before, after, NAMES)
    assert (found.before, found.after, found.added, found.removed, found.changed) == (3, 3, 1, 1, 2)
    assert found.days == (date(2024, 2, 27), date(2024, 2, 28), date(2024, 2, 29))
    assert found.features == (FeatureChange("b", 2, 1, 1, 0.0), FeatureChange("a", 1, 0, 0, 0.5))


@pytest.mark.parametrize(("noise", "same"), [(1e-12, True), (1e-6, False)])
def test_the_last_digits_of_a_sum_are_no_difference(noise: float, same: bool) -> None:
    found = differences(frame({("p", 0): (100.0, 0.0)}), frame({("p", 0): (100.0 + noise * 100, noise)}), NAMES)
    assert found.nothing is same


values = st.one_of(st.none(), st.floats(-50, 50).map(lambda number: round(number, 1)))
tables = st.dictionaries(
    st.tuples(st.sampled_from("pqr"), st.integers(0, 4)), st.tuples(values, values), max_size=8
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(tables, tables)
def test_differences_are_those_of_a_plain_comparison(before: Rows, after: Rows) -> None:
    found = differences(frame(before), frame(after), NAMES)
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    other = changed | (before.keys() ^ after.keys())
    assert found.days == tuple(sorted({(START + timedelta(days=day)).date() for _, day in other}))
    assert (found.added, found.removed) == (len(after.keys() - before.keys()), len(before.keys() - after.keys()))
    assert found.changed == len(changed)
    assert {change.feature: change.changed for change in found.features} == {
        name: count
        for number, name in enumerate(NAMES)
        if (count := sum(before[key][number] != after[key][number] for key in changed))
    }
    assert _from_text(_to_text(found)) == found


@settings(max_examples=30, deadline=None)
@given(tables, tables)
def test_differences_of_days_add_up(before: Rows, after: Rows) -> None:
    whole = differences(frame(before), frame(after), NAMES)
    parts = Differences()
    for day in range(5):
        of_day = [{key: row for key, row in rows.items() if key[1] == day} for rows in (before, after)]
        parts += differences(frame(of_day[0]), frame(of_day[1]), NAMES)
    assert parts == whole


# ------------------------------------------------------------------------------------------------------------- values


def feature_rows(**changes: Any) -> pl.DataFrame:
    import polars as pl

    names = feature_names(PILOT)
    pressures = ("heart_rate", "systolic", "diastolic", "weight")
    good = dict.fromkeys(names, 1.0)
    good |= {name: 70.0 for name in names if name.startswith(pressures)}
    good |= {name: 37.0 for name in names if name.startswith("temperature")}
    rows = {"patient_id": ["p"], "feature_time": [START], **{name: [value] for name, value in (good | changes).items()}}
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(good, pl.Float64))


def test_good_values_keep_every_rule() -> None:
    report = check_values(feature_rows(), PILOT)
    assert report.valid
    assert report.features == len(feature_names(PILOT))
    assert all(rule.checked for rule in report.rules)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lab_alt_mean": float("inf")}, "finite"),
        ({"lab_alt_mean": float("nan")}, "finite"),
        ({"ae_count_ever": -1.0}, "counts_are_whole"),
        ({"ae_count_ever": 1.5}, "counts_are_whole"),
        ({"sex_male": 2.0}, "indicators_are_0_or_1"),
        ({"heart_rate_std_7d": -0.1}, "deviations_not_negative"),
        ({"heart_rate_mean_7d": 71.0}, "statistics_in_order"),
        ({"systolic_bp_latest": 400.0}, "vitals_plausible"),
        ({"age_years": 130.0}, "age_plausible"),
    ],
)
def test_a_wrong_value_breaks_its_rule(changes: dict[str, float], rule: str) -> None:
    report = check_values(feature_rows(**changes), PILOT)
    assert not report.valid
    assert [(broken.name, broken.features) for broken in report.broken] == [(rule, tuple(changes))]


def test_a_row_twice_and_nearly_empty_rows_are_not_valid() -> None:
    import polars as pl

    twice = check_values(pl.concat([feature_rows(), feature_rows()]), PILOT)
    assert [rule.name for rule in twice.broken] == ["one_row_a_patient_and_time"]
    names = feature_names(PILOT)
    empty = check_values(feature_rows(**dict.fromkeys(names)), PILOT)
    assert empty.empty_share > MAX_EMPTY_SHARE
    assert (empty.valid, empty.broken, len(empty.empty_features)) == (False, (), len(names))


def test_no_rows_are_valid() -> None:
    assert check_values(feature_rows().clear(), PILOT).valid


# ------------------------------------------------------------------------------------------------- rows there should be


def vitals(*moments: tuple[str, float, float]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(
        {
            "patient_id": [patient for patient, _, _ in moments],
            "event_time": [START + timedelta(hours=event) for _, event, _ in moments],
            "received_at": [START + timedelta(hours=received) for _, _, received in moments],
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC"), "received_at": pl.Datetime("us", "UTC")},
    )


def test_a_visit_is_due_at_the_end_of_its_day_unless_received_later() -> None:
    found = expected_times(vitals(("p", 0, 0), ("p", 9, 30), ("q", 25, 80)), PILOT)
    assert found.rows() == [("p", START + timedelta(days=1, seconds=-1))]


def test_an_interval_is_due_when_it_ends_and_the_patient_is_still_seen() -> None:
    grid = PILOT.model_copy(
        update={"features": PILOT.features.model_copy(
            update={"times": FeatureTimes(kind="interval", every=timedelta(hours=12))})}
    )  # fmt: skip
    found = expected_times(vitals(("p", 1, 1), ("p", 12, 12), ("p", 13, 13), ("q", 5, 5)), grid)
    assert found.rows() == [("p", START + timedelta(hours=12))]


# -------------------------------------------------------------------------------------------------------------- ranges


def test_conf_gives_days_in_utc() -> None:
    conf = {"start_date": "2013-01-01T23:30:00-05:00", "end_date": "2013-12-31"}
    assert days_of_conf(conf) == (date(2013, 1, 2), date(2013, 12, 31))
    assert days_of_conf({}) == (None, None)
    assert days_of_conf({"trial": "simulated", "reason": "new unit", "param1": "value1"}) == (None, None)


@pytest.mark.parametrize(
    "conf", [{"start_date": "x"}, {"end_date": 5}, {"start_date": "2014-01-02", "end_date": "2014-01-01"}]
)
def test_a_wrong_conf_is_refused(conf: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="_date"):
        days_of_conf(conf)


@pytest.mark.parametrize(
    ("key", "meant"), [("startDate", "start_date"), ("start", "start_date"), ("end-date", "end_date")]
)
def test_a_misspelt_range_does_not_stand_for_the_whole_trial(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is not known; write {meant}"):
        days_of_conf({key: "2013-01-01"})


def test_a_request_is_the_same_only_for_the_same_rows() -> None:
    one = Days(date(2013, 1, 1), date(2013, 1, 31))
    assert len(one) == 31
    assert request_id(PILOT, one, {"a": 1, "b": 2}) == request_id(PILOT, one, {"b": 2, "a": 1})
    others = {
        request_id(PILOT, one, {"a": 1, "b": 2}),
        request_id(PILOT, one, {"a": 2, "b": 2}),
        request_id(PILOT, Days(date(2013, 1, 1), date(2013, 1, 30)), {"a": 1, "b": 2}),
        request_id(load_trial("simulated"), one, {"a": 1, "b": 2}),
    }
    assert len(others) == 4
    with pytest.raises(ValueError, match="before it begins"):
        Days(date(2013, 1, 2), date(2013, 1, 1))
