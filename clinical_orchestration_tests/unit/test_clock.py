"""The present of a trial: its newest record, or the wall clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clinical_orchestration.trials import TrialProfile, load_trial
from clinical_orchestration.trials.clock import trial_now

WALL = datetime(2026, 3, 1, 12, tzinfo=UTC)
NEWEST = datetime(2014, 5, 2, 8, tzinfo=UTC)


def profile(clock: str) -> TrialProfile:
    return load_trial("simulated").model_copy(update={"clock": clock})


def test_a_trial_of_the_past_ends_with_its_newest_record() -> None:
    assert trial_now(profile("data"), NEWEST, WALL) == NEWEST


def test_a_trial_of_the_past_without_records_is_in_the_present() -> None:
    assert trial_now(profile("data"), None, WALL) == WALL


def test_a_live_trial_follows_the_wall_clock() -> None:
    assert trial_now(profile("wall"), NEWEST, WALL) == WALL


@pytest.mark.parametrize("name", ["cdisc-pilot", "simulated"])
def test_the_shipped_trials_are_of_the_past(name: str) -> None:
    assert load_trial(name).clock == "data"


@pytest.mark.parametrize(("newest", "wall"), [(NEWEST.replace(tzinfo=None), WALL), (NEWEST, WALL.replace(tzinfo=None))])
def test_a_time_without_a_zone_is_refused(newest: datetime, wall: datetime) -> None:
    with pytest.raises(ValueError, match="time zone"):
        trial_now(profile("data"), newest, wall)


@given(
    st.datetimes(timezones=st.integers(-12, 14).map(lambda hours: timezone(timedelta(hours=hours)))),
    st.sampled_from(["data", "wall"]),
)
def test_the_answer_is_one_of_the_two_times_in_utc(newest: datetime, clock: str) -> None:
    assume(2 < newest.year < 9998)  # beyond, other zones' times cannot be told in UTC
    now = trial_now(profile(clock), newest, WALL)
    assert now.tzinfo is UTC
    assert now == (newest if clock == "data" else WALL)
