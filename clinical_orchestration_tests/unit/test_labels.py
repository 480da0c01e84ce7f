"""Which rows can be learned from, and their labels."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.features.labels import last_records, training_rows
from clinical_orchestration.trials import load_trial

if TYPE_CHECKING:
    import polars as pl

PILOT = load_trial("cdisc-pilot")  # 14 days, observed until the end of treatment
STREAM = load_trial("simulated")  # 24 hours, observed until the last record
START = datetime(2014, 1, 1, tzinfo=UTC)


def day(number: float) -> datetime:
    return START + timedelta(days=number)


def visit(number: int) -> datetime:
    """The feature time of the visit on a day: its last second."""
    return day(number + 1) - timedelta(seconds=1)


def frame(rows: list[dict[str, Any]], **types: Any) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(rows, schema=types)


def features(*times: datetime, patient: str = "P1", trial: str = PILOT.name) -> pl.DataFrame:
    import polars as pl

    profile = load_trial(trial)
    rows = [{"trial": trial, "patient_id": patient, "feature_time": t, "feature_date": t.date()} for t in times]
    keys = frame(rows, trial=pl.String, patient_id=pl.String, feature_time=pl.Datetime("us", "UTC"),
                 feature_date=pl.Date)  # fmt: skip
    return keys.with_columns([pl.lit(1.0).alias(name) for name in feature_names(profile)])


def events(*onsets: tuple[datetime, str | None], patient: str = "P1", trial: str = PILOT.name) -> pl.DataFrame:
    import polars as pl

    rows = [
        {"trial": trial, "patient_id": patient, "event_time": onset, "onset_precision": precision}
        for onset, precision in onsets
    ]
    return frame(rows, trial=pl.String, patient_id=pl.String, event_time=pl.Datetime("us", "UTC"),
                 onset_precision=pl.String)  # fmt: skip


def subjects(patient: str = "P1", trial: str = PILOT.name, **facts: Any) -> pl.DataFrame:
    import polars as pl

    times = ("received_at", "treatment_start", "treatment_end", "death_time")
    row = {
        "trial": trial, "patient_id": patient, "source_position": "dm#1", "site": "701", "sex": "F",
        "arm": "High", "actual_arm": "Low", "received_at": START, "treatment_start": START,
        "treatment_end": day(200), "death_time": None, "screen_failure": False, **facts,
    }  # fmt: skip
    types = {name: pl.Datetime("us", "UTC") if name in times else pl.String for name in row}
    return frame([row], **{**types, "screen_failure": pl.Boolean})


def no_records() -> pl.DataFrame:
    import polars as pl

    return frame([], patient_id=pl.String, last_record=pl.Datetime("us", "UTC"))


def label_of(onset: datetime, precision: str | None = "day") -> int:
    rows = training_rows(features(visit(10)), events((onset, precision)), subjects(), no_records(), PILOT)
    return int(rows["label"].item())


@pytest.mark.parametrize(
    ("onset", "label"),
    [
        (day(10), 0),  # the day of the visit: history
        (day(11), 1),  # the day after
        (day(24), 1),  # the last day of the horizon
        (day(25), 0),  # the day after that
        (day(9), 0),
    ],
)
def test_an_event_that_starts_after_the_visit_within_the_horizon_is_the_label(onset: datetime, label: int) -> None:
    assert label_of(onset) == label


def test_the_horizon_is_closed_at_its_end_and_open_at_its_start() -> None:
    t = visit(10)
    assert label_of(t, "second") == 0
    assert label_of(t + timedelta(microseconds=1), "second") == 1
    assert label_of(t + timedelta(days=14), "second") == 1
    assert label_of(t + timedelta(days=14, microseconds=1), "second") == 0


@pytest.mark.parametrize(("precision", "label"), [("year", 0), ("month", 0), ("missing", 0), ("minute", 1), (None, 1)])
def test_only_onsets_known_to_the_day_count(precision: str | None, label: int) -> None:
    assert label_of(day(12), precision) == label


def test_an_earlier_event_does_not_hide_a_later_one() -> None:
    rows = training_rows(
        features(visit(10)),
        events((day(3), "day"), (day(10), "day"), (day(20), "day")),
        subjects(),
        no_records(),
        PILOT,
    )
    assert rows["label"].to_list() == [1]


def test_other_patients_events_and_other_trials_events_are_no_labels() -> None:
    import polars as pl

    both = pl.concat([events((day(12), "day"), patient="P2"), events((day(12), "day"), trial="simulated")])
    assert training_rows(features(visit(10)), both, subjects(), no_records(), PILOT)["label"].to_list() == [0]


def eligible(t: datetime, **facts: Any) -> bool:
    return training_rows(features(t), events(), subjects(**facts), no_records(), PILOT).height == 1


def test_rows_before_the_first_dose_do_not_count_and_its_day_does() -> None:
    assert not eligible(visit(-1))
    assert eligible(visit(0))


def test_the_whole_horizon_must_lie_before_the_end_of_treatment() -> None:
    end_of_day_24 = day(25) - timedelta(microseconds=1)
    assert eligible(visit(10), treatment_end=end_of_day_24)
    assert not eligible(visit(11), treatment_end=end_of_day_24)
    assert not eligible(visit(10), treatment_end=None)


def test_a_positive_row_with_an_unobserved_rest_does_not_count_either() -> None:
    rows = training_rows(
        features(visit(10)), events((day(11), "day")), subjects(treatment_end=day(20)), no_records(), PILOT
    )
    assert rows.height == 0


def test_the_untreated_and_the_dead_do_not_count() -> None:
    assert not eligible(visit(10), treatment_start=None)
    assert not eligible(visit(10), death_time=day(5))
    assert eligible(visit(10), death_time=day(60))


def test_rows_carry_the_group_of_the_subject_with_the_arm_as_treated() -> None:
    rows = training_rows(features(visit(10)), events(), subjects(), no_records(), PILOT)
    assert rows.select("site", "sex", "arm").row(0) == ("701", "F", "Low")
    assert rows.columns[-4:] == ["label", "site", "sex", "arm"]


def test_rows_are_sorted_so_that_folds_repeat() -> None:
    rows = training_rows(features(visit(30), visit(2), visit(10)), events(), subjects(), no_records(), PILOT)
    assert rows["feature_time"].to_list() == [visit(2), visit(10), visit(30)]


def test_a_stream_is_observed_until_the_patients_last_record() -> None:
    import polars as pl

    vitals = frame([{"patient_id": "P1", "event_time": day(2)}, {"patient_id": "P1", "event_time": day(1)}],
                   patient_id=pl.String, event_time=pl.Datetime("us", "UTC"))  # fmt: skip
    times = [day(0.5), day(1), day(1.25)]
    rows = training_rows(
        features(*times, trial=STREAM.name),
        events((day(1.5), None), trial=STREAM.name),
        subjects(trial=STREAM.name, treatment_start=None, treatment_end=None),
        last_records(vitals),
        STREAM,
    )
    assert rows["feature_time"].to_list() == [day(0.5), day(1)]
    assert rows["label"].to_list() == [1, 1]


def test_a_stream_without_demographics_still_trains() -> None:
    import polars as pl

    vitals = frame([{"patient_id": "P1", "event_time": day(3)}], patient_id=pl.String,
                   event_time=pl.Datetime("us", "UTC"))  # fmt: skip
    rows = training_rows(
        features(day(1), trial=STREAM.name),
        events(trial=STREAM.name),
        subjects(patient="somebody else", trial=STREAM.name),
        last_records(vitals),
        STREAM,
    )
    assert rows.select("label", "site").row(0) == (0, None)


def test_of_two_subject_records_the_last_received_counts() -> None:
    import polars as pl

    both = pl.concat([subjects(site="new", received_at=day(5)), subjects(site="old", received_at=day(1))])
    assert training_rows(features(visit(10)), events(), both, no_records(), PILOT)["site"].to_list() == ["new"]
