"""Concept drift: the error stream, its detectors and their false alarms."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river.drift import PageHinkley

from clinical_orchestration.monitoring import concept
from clinical_orchestration.monitoring.concept import detect, detect_in_stream, excess_log_loss, page_hinkley_maxima

START = datetime(2025, 1, 1, tzinfo=UTC)


def stream(seed: int, *, shift: float = 0.0, subjects: int = 80, visits: int = 8, own: float = 0.6):
    """Return errors, subjects and times; `own` is how much subjects differ, `shift` the change of log odds half-way."""
    rng = np.random.default_rng(seed)
    times = (rng.uniform(0, 40, subjects)[:, None] + 5 * np.arange(visits)).ravel()
    people = np.repeat(np.arange(subjects), visits)
    log_odds = -1.0 + rng.normal(size=len(times))
    true = log_odds + own * rng.normal(size=subjects)[people] + np.where(times > np.median(times), shift, 0)
    labels = (rng.random(len(times)) < 1 / (1 + np.exp(-true))).astype(int)
    order = np.argsort(times)
    return labels[order], (1 / (1 + np.exp(-log_odds)))[order], people[order], times[order]


@given(st.floats(0.01, 0.99))
def test_excess_log_loss_has_mean_zero_where_the_probability_is_right(p: float) -> None:
    both = excess_log_loss([1, 0], [p, p])
    assert p * both[0] + (1 - p) * both[1] == pytest.approx(0, abs=1e-9)
    loss = -np.log([p, 1 - p])
    expected = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(both, loss - expected, atol=1e-9)


def test_a_certain_model_gives_finite_errors() -> None:
    assert np.abs(excess_log_loss([0, 1, 0, 1], [0.0, 0.0, 1.0, 1.0])).max() < 5


def test_bootstrap_statistic_is_that_of_river() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=300)
    detector = PageHinkley(min_instances=30, delta=0.0, threshold=1e9, alpha=0.9999, mode="up")
    highest = 0.0
    for number, value in enumerate(values):
        detector.update(value)
        if number + 1 >= 30:
            highest = max(highest, detector._sum_increase - detector._min_increase)
    assert page_hinkley_maxima(values[None])[0] == pytest.approx(highest)


def test_false_alarms_are_rare_though_subjects_differ() -> None:
    alarms = 0
    for seed in range(25):
        labels, probabilities, people, _ = stream(seed)
        found = detect_in_stream(excess_log_loss(labels, probabilities), people, seed=seed)
        alarms += any(item.fired for item in found.values())
    assert alarms <= 1


def test_a_change_half_way_is_found_by_both_and_dated_after_it() -> None:
    found = {"page_hinkley": 0, "adwin": 0}
    for seed in range(10):
        labels, probabilities, people, times = stream(seed, shift=1.6)
        for name, item in detect_in_stream(excess_log_loss(labels, probabilities), people, seed=seed).items():
            found[name] += item.fired
            if item.at is not None:
                assert times[item.at] > np.median(times)
    assert min(found.values()) >= 8


def test_errors_that_shrink_are_no_drift() -> None:
    rng = np.random.default_rng(3)
    errors = np.append(rng.normal(1.5, 1, 400), rng.normal(0, 1, 400))
    people = np.tile(np.arange(100), 8)
    assert not any(item.fired for item in detect_in_stream(errors, people, seed=1).values())


def frame(seed: int, **options: float) -> pl.DataFrame:
    labels, probabilities, people, times = stream(seed, **options)  # type: ignore[arg-type]
    moments = [START + timedelta(days=float(time)) for time in times]
    return pl.DataFrame(
        {
            "prediction_id": [f"id{number}" for number in range(len(labels))],
            "patient_id": [f"P{number}" for number in people],
            "index_time": pl.Series(moments, dtype=pl.Datetime("us", "UTC")),
            "probability": probabilities,
            "outcome": labels,
        }
    )


def test_detection_is_reproducible_and_does_not_depend_on_the_order_of_rows() -> None:
    rows = frame(5, shift=1.6)
    first, again = detect(rows, seed=1), detect(rows.sample(fraction=1, shuffle=True, seed=2), seed=1)
    assert first.status == "drift"
    assert first.detected_at == again.detected_at
    assert first.detectors == again.detectors


def test_too_few_outcomes_are_no_verdict() -> None:
    assert detect(frame(6).head(50)).status == "insufficient_data"
    assert detect(frame(6).with_columns(patient_id=pl.lit("P"))).status == "insufficient_data"
    assert detect(frame(6).clear()).detected_at is None


def test_only_the_newest_outcomes_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concept, "MAX_OUTCOMES", 200)
    assert len(detect(frame(7)).times) == 200


def test_a_model_that_always_says_a_half_has_nothing_to_watch() -> None:
    rows = frame(8).with_columns(probability=0.5)
    assert detect(rows).status == "none"
