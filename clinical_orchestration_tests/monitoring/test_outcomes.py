"""The join of predictions with what followed them."""

from dataclasses import astuple
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.features.labels import last_records, training_rows
from clinical_orchestration.monitoring.outcomes import OutcomeCounts, in_scope, join_outcomes
from clinical_orchestration.tables import PREDICTION_OUTCOMES_COLUMNS, PREDICTIONS_COLUMNS, SILVER_COLUMNS, arrow_schema
from clinical_orchestration.trials import load_trial

PILOT = load_trial("cdisc-pilot")  # observed until the end of treatment, horizon 14 days
SIMULATED = load_trial("simulated")  # observed until the last record, horizon 24 hours
START = datetime(2025, 1, 1, tzinfo=UTC)
LONG_AFTER = START + timedelta(days=1000)


def day(number: float) -> datetime:
    return START + timedelta(days=number)


def table(domain: str, rows: list[dict[str, object]], trial: str) -> pl.DataFrame:
    columns = SILVER_COLUMNS[domain]
    filled = [
        dict.fromkeys(columns) | {"trial": trial, "received_at": START, "source_position": str(i), **row}
        for i, row in enumerate(rows)
    ]
    import pyarrow as pa

    return pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(filled, schema=arrow_schema(columns))))


def predictions(rows: list[dict[str, object]], trial: str) -> pl.DataFrame:
    import pyarrow as pa

    filled = [
        dict.fromkeys(PREDICTIONS_COLUMNS)
        | {"prediction_id": f"id{i}", "trial": trial, "predicted_at": START, "probability": 0.5, "model_name": "m",
           "model_version": "1", **row}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(filled, schema=arrow_schema(PREDICTIONS_COLUMNS))))


def pilot_outcomes(
    asked: list[dict[str, object]], onsets: list[datetime], *, end: datetime = LONG_AFTER, now: datetime = LONG_AFTER,
    death: datetime | None = None,
) -> tuple[dict[str, int], OutcomeCounts]:  # fmt: skip
    subjects = table(
        "subjects",
        [{"patient_id": "A", "treatment_start": START, "treatment_end": end, "death_time": death, "event_time": START}],
        PILOT.name,
    )
    events = table(
        "adverse_events",
        [{"patient_id": "A", "event_time": onset, "onset_precision": "day"} for onset in onsets],
        PILOT.name,
    )
    records = last_records(table("patient_vitals", [], PILOT.name))
    found, counts = join_outcomes(
        predictions(asked, PILOT.name), events, subjects, records, PILOT, now=now, recorded_at=LONG_AFTER
    )
    assert found.columns == list(PREDICTION_OUTCOMES_COLUMNS)
    return dict(zip(found["prediction_id"], found["outcome"], strict=True)), counts


@pytest.mark.parametrize(
    ("onset", "outcome"),
    [(day(10), 0), (day(10) + timedelta(seconds=1), 1), (day(24), 1), (day(24) + timedelta(seconds=1), 0), (day(9), 0)],
    ids=["at the index time", "just after it", "as the horizon ends", "just after the horizon", "before"],
)
def test_an_event_counts_within_the_horizon_only(onset: datetime, outcome: int) -> None:
    found, counts = pilot_outcomes([{"patient_id": "A", "feature_time": day(10)}], [onset])
    assert found == {"id0": outcome}
    assert (counts.determined, counts.events) == (1, outcome)


def test_the_time_of_the_prediction_counts_where_features_have_none() -> None:
    asked = [{"patient_id": "A", "feature_time": None, "predicted_at": day(10)}]
    assert pilot_outcomes(asked, [day(20)])[0] == {"id0": 1}


@pytest.mark.parametrize(
    ("case", "state"),
    [
        ({"now": day(23)}, "waiting"),
        ({"now": day(24)}, "determined"),
        ({"end": day(23)}, "censored"),
        ({"death": day(10)}, "out_of_scope"),
        ({"asked": [{"patient_id": "A", "feature_time": day(-1)}]}, "out_of_scope"),
        ({"asked": [{"patient_id": None, "feature_time": day(10)}]}, "unknown_patient"),
        ({"asked": [{"patient_id": "B", "feature_time": day(10)}]}, "unknown_patient"),
    ],
)
def test_every_prediction_is_in_one_state(case: dict[str, object], state: str) -> None:
    arguments = {"asked": [{"patient_id": "A", "feature_time": day(10)}], **case}
    found, counts = pilot_outcomes(arguments.pop("asked"), [day(12)], **arguments)  # type: ignore[arg-type]
    assert getattr(counts, state) == counts.total == 1
    assert len(found) == counts.determined


def test_an_early_event_does_not_excuse_an_unobserved_rest() -> None:
    _, counts = pilot_outcomes([{"patient_id": "A", "feature_time": day(10)}], [day(11)], end=day(20))
    assert (counts.determined, counts.censored) == (0, 1)


def test_a_prediction_that_was_logged_twice_has_one_outcome() -> None:
    asked = [{"patient_id": "A", "feature_time": day(10), "prediction_id": "same"}] * 2
    found, counts = pilot_outcomes(asked, [])
    assert found == {"same": 0}
    assert counts.total == 1


def test_other_trials_are_left_out() -> None:
    _, counts = pilot_outcomes([{"patient_id": "A", "feature_time": day(10), "trial": "another"}], [])
    assert counts.total == 0


moments = st.integers(0, 40 * 24).map(lambda hours: day(hours / 24))


@settings(deadline=None, max_examples=60)
@given(moments, st.lists(moments, max_size=5), st.lists(moments, max_size=5))
def test_nothing_after_the_horizon_has_a_say(index: datetime, onsets: list[datetime], later: list[datetime]) -> None:
    """Events from the end of the horizon on change nothing, and neither do events up to the index time."""
    asked = [{"patient_id": "A", "feature_time": index}]
    outside = [onset for onset in later if onset <= index or onset > index + PILOT.target.horizon]
    assert pilot_outcomes(asked, onsets) == pilot_outcomes(asked, onsets + outside)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("ABC"), moments), min_size=1, max_size=12, unique=True),
       st.lists(st.tuples(st.sampled_from("ABC"), moments), max_size=12), moments)  # fmt: skip
def test_outcomes_are_the_labels_that_training_would_have(
    rows: list[tuple[str, datetime]], onsets: list[tuple[str, datetime]], last: datetime
) -> None:
    subjects = table(
        "subjects",
        [{"patient_id": patient, "event_time": START, "treatment_start": day(2)} for patient in "ABC"],
        SIMULATED.name,
    )
    events = table("adverse_events", [{"patient_id": p, "event_time": t} for p, t in onsets], SIMULATED.name)
    records = last_records(
        table("patient_vitals", [{"patient_id": patient, "event_time": last} for patient in "ABC"], SIMULATED.name)
    )
    features = pl.DataFrame(
        {
            "trial": [SIMULATED.name] * len(rows),
            "patient_id": [patient for patient, _ in rows],
            "feature_time": pl.Series([time for _, time in rows], dtype=pl.Datetime("us", "UTC")),
            "feature_date": [time.date() for _, time in rows],
        }
    ).with_columns(pl.lit(0.0).alias(name) for name in feature_names(SIMULATED))
    labels = training_rows(features, events, subjects, records, SIMULATED)
    asked = predictions([{"patient_id": p, "feature_time": t} for p, t in rows], SIMULATED.name)
    found, counts = join_outcomes(asked, events, subjects, records, SIMULATED, now=LONG_AFTER, recorded_at=LONG_AFTER)
    assert sorted(found.select("patient_id", "index_time", "outcome").rows()) == sorted(
        labels.select("patient_id", "feature_time", "label").rows()
    )
    assert sum(astuple(counts)) - counts.events == len(rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(moments, min_size=1, max_size=8), st.lists(moments, max_size=6), st.lists(moments, max_size=3))
def test_outcomes_in_steps_are_those_at_once(
    asked: list[datetime], onsets: list[datetime], steps: list[datetime]
) -> None:
    """However often it is looked in between, each prediction gets the same outcome, once."""
    rows: list[dict[str, object]] = [
        {"patient_id": "A", "feature_time": time, "prediction_id": f"id{i}"} for i, time in enumerate(asked)
    ]
    at_once, _ = pilot_outcomes(rows, onsets, now=day(60))
    written: dict[str, int] = {}
    for now in [*sorted(steps), day(60), day(60)]:
        left = [row for row in rows if row["prediction_id"] not in written]
        # what is known then: nothing later has happened yet
        found, _ = pilot_outcomes(left, [onset for onset in onsets if onset <= now], now=now)
        assert not set(found) & set(written)
        written |= found
    assert written == at_once


def test_rows_in_scope_are_those_under_observation() -> None:
    subjects = table(
        "subjects",
        [{"patient_id": "A", "treatment_start": day(5), "treatment_end": day(20), "death_time": day(15),
          "event_time": START}],
        PILOT.name,
    )  # fmt: skip
    rows = pl.DataFrame(
        {"patient_id": ["A"] * 4 + ["B"], "feature_time": [day(4), day(5), day(14), day(15), day(10)]},
        schema_overrides={"feature_time": pl.Datetime("us", "UTC")},
    )
    found = in_scope(rows, subjects, last_records(table("patient_vitals", [], PILOT.name)), PILOT)
    assert found["feature_time"].to_list() == [day(5), day(14)]
    assert set(found["start"]) == {day(5)}
