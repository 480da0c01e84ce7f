"""Freshness by each source's own rhythm."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.quality.freshness import (
    FACTOR,
    Freshness,
    newest_record,
    observation_ends,
    rhythm_of,
    source_freshness,
)
from clinical_orchestration_tests.quality_frames import simulated_frames

START = datetime(2025, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
LABS = ("lab_results",)
PATIENTS = 4


def sent(times: list[datetime], site: str = "S1", table: str = "lab_results", test: str = "ALT") -> pl.DataFrame:
    """Return arrivals of four patients of a site at each time."""
    rows: list[dict[str, Any]] = [
        {"table": table, "patient_id": f"{site}-{number}", "site": site, "test_code": test, "lab_id": f"L-{site}",
         "time": time + timedelta(seconds=number)}
        for time in times
        for number in range(PATIENTS)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"time": pl.Datetime("us", "UTC")})


def daily(days: int) -> list[datetime]:
    return [START + number * DAY for number in range(days)]


def judge(arrivals: pl.DataFrame, now: datetime, ends: dict[str, datetime] | None = None) -> dict[str, Freshness]:
    known = arrivals["patient_id"].unique().to_list()
    until = pl.DataFrame(
        {"patient_id": known, "until": [(ends or {}).get(patient) for patient in known]},
        schema_overrides={"patient_id": pl.String, "until": pl.Datetime("us", "UTC")},
    )
    return {item.source: item for item in source_freshness(arrivals, until, now, tables=LABS)}


def test_a_site_that_stopped_is_found_and_the_others_are_not() -> None:
    arrivals = pl.concat([sent(daily(20)), sent(daily(16), "S2"), sent(daily(20), "S3")])
    found = judge(arrivals, START + 19 * DAY)
    assert {name for name, item in found.items() if item.status == "stale"} == {"lab_results/S2", "lab_results/L-S2"}
    assert found["lab_results"].status == "fresh"
    assert found["lab_results/S2"].rhythm == pytest.approx(DAY.total_seconds(), rel=0.01)


def test_one_test_of_a_site_that_stopped_is_found() -> None:
    arrivals = pl.concat([sent(daily(20)), sent(daily(14), test="AST")])
    found = judge(arrivals, START + 19 * DAY)
    assert [name for name, item in found.items() if item.status == "stale"] == ["lab_results/S1/AST"]


def test_what_is_below_a_stale_source_is_not_told_again() -> None:
    arrivals = pl.concat([sent(daily(10)), sent(daily(20), "S2")])
    found = judge(arrivals, START + 19 * DAY)
    assert "lab_results/S1/ALT" not in found


@pytest.mark.parametrize(("days", "status"), [(1, "fresh"), (2, "fresh"), (3, "stale")])
def test_two_missed_turns_are_too_many(days: int, status: str) -> None:
    found = judge(pl.concat([sent(daily(20)), sent(daily(24), "S2")]), START + (19 + days) * DAY)
    assert found["lab_results/S1"].status == status


def test_the_rhythm_is_each_sources_own() -> None:
    weekly = [START + 7 * number * DAY for number in range(8)]
    arrivals = pl.concat([sent(weekly), sent(daily(50), "S2"), sent(daily(56), "S3")])
    found = judge(arrivals, START + 55 * DAY)
    assert found["lab_results/S1"].status == "fresh"  # silent for 6 days
    assert found["lab_results/S2"].status == "stale"  # silent for 6 days


def test_a_site_whose_patients_have_ended_is_closed() -> None:
    ends = {f"S1-{number}": START + 9 * DAY for number in range(PATIENTS)}
    found = judge(pl.concat([sent(daily(10)), sent(daily(20), "S2")]), START + 19 * DAY, ends)
    assert found["lab_results/S1"].status == "closed"


def test_a_young_source_borrows_the_rhythm_of_the_others() -> None:
    others = [sent(daily(20), f"S{number}") for number in range(2, 6)]
    young = [START + 14 * DAY, START + 15 * DAY]
    found = judge(pl.concat([sent(young), *others]), START + 19 * DAY)
    assert found["lab_results/S1"].status == "stale"
    alone = judge(sent(young), START + 19 * DAY)
    assert alone["lab_results/S1"].status == "new"


def test_an_outage_of_the_past_does_not_lengthen_the_rhythm() -> None:
    times = [time for time in daily(60) if not 20 <= (time - START).days < 32]
    found = judge(pl.concat([sent(times), sent(daily(66), "S2")]), START + 64 * DAY)
    assert found["lab_results/S1"].status == "stale"


def test_bursts_have_the_rhythm_of_their_period() -> None:
    bursts = [START + number * DAY + timedelta(seconds=30 * k) for number in range(10) for k in range(40)]
    rhythm = rhythm_of(np.array([time.timestamp() for time in bursts]))
    assert rhythm == pytest.approx(86_400, rel=0.05)


@given(st.integers(5, 60), st.floats(1, 1e6))
def test_the_rhythm_of_a_regular_source_is_its_period(count: int, period: float) -> None:
    assert rhythm_of(np.arange(count) * period) == pytest.approx(period, rel=1e-6)


@given(st.lists(st.floats(0, 1e7, allow_nan=False), min_size=0, max_size=60), st.floats(0.1, 100))
def test_the_rhythm_scales_with_time(times: list[float], factor: float) -> None:
    sorted_times = np.unique(np.array(times, dtype=float))
    first, second = rhythm_of(sorted_times), rhythm_of(sorted_times * factor)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert second == pytest.approx(first * factor, rel=1e-3)


def test_a_random_source_is_rarely_called_stale() -> None:
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(400):
        times = np.cumsum(rng.exponential(3600, 200))
        rhythm = rhythm_of(times[:-1])
        assert rhythm is not None
        silence = rng.exponential(3600)  # a Poisson source has no memory
        alarms += silence > FACTOR * rhythm
    assert alarms <= 1


@pytest.mark.parametrize("seed", [21, 22, 23])
@pytest.mark.parametrize("until_day", [2.2, 3.7])
def test_no_source_of_a_clean_simulated_trial_is_stale(seed: int, until_day: float) -> None:
    frames = simulated_frames(seed=seed, subjects=30, sites=5, days=5.0, until_day=until_day)
    arrivals = pl.concat(
        frames[table].select(
            pl.lit(table).alias("table"), "patient_id",
            pl.col("patient_id").str.extract(r"-(\d{3})-").alias("site"), "test_code",
            pl.lit(None, pl.String).alias("lab_id"), pl.col("event_time").alias("time"),
        )
        for table in ("patient_vitals", "lab_results")
    )  # fmt: skip
    now = newest_record(arrivals)
    assert now is not None
    ends = observation_ends(frames["subjects"])
    found = source_freshness(arrivals, ends, now, tables=("patient_vitals", "lab_results"))
    assert [item.source for item in found if item.status == "stale"] == []
    assert sum(item.status == "fresh" for item in found) > 25


def test_one_record_dated_ahead_does_not_move_the_present() -> None:
    arrivals = pl.concat([sent(daily(20), f"S{number}") for number in range(4)])
    ahead = arrivals.head(1).with_columns(time=pl.lit(START + 900 * DAY).cast(pl.Datetime("us", "UTC")))
    now = newest_record(pl.concat([arrivals, ahead]))
    assert now is not None
    assert now < START + 20 * DAY


def test_without_records_there_is_no_present_and_no_source() -> None:
    empty = sent(daily(1)).clear()
    assert newest_record(empty) is None
    assert judge(empty, START) == {}


def test_observation_ends_with_treatment_death_or_failed_screening() -> None:
    subjects = pl.DataFrame(
        {
            "patient_id": ["a", "b", "c", "d"],
            "event_time": [START] * 4,
            "treatment_end": [START + 5 * DAY, None, None, None],
            "death_time": [START + 3 * DAY, None, None, None],
            "screen_failure": [False, True, False, None],
        },
        schema_overrides={name: pl.Datetime("us", "UTC") for name in ("event_time", "treatment_end", "death_time")},
    )
    ends = dict(observation_ends(subjects).iter_rows())
    assert ends["a"] == START + 3 * DAY
    assert ends["b"] == START
    assert ends["c"] is None
    assert ends["d"] is None
