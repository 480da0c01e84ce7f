"""The verdict on a model version from its outcomes."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from clinical_orchestration.modeling.evaluate import evaluate
from clinical_orchestration.modeling.results import Evaluation
from clinical_orchestration.monitoring.performance import MAX_WINDOWS, assess, one_a_feature_row, table_rows
from clinical_orchestration.tables import MODEL_PERFORMANCE_COLUMNS
from clinical_orchestration.trials import load_trial

PROFILE = load_trial("simulated")
START = datetime(2025, 1, 1, tzinfo=UTC)


def outcomes(
    seed: int = 0,
    *,
    subjects: int = 80,
    days: int = 12,
    signal: float = 1.5,
    shift: float = 0.0,
    inverted: bool = False,
) -> pl.DataFrame:
    """Return outcomes whose probabilities are right (`shift` 0), too low (above 0), or without skill (`inverted`)."""
    rng = np.random.default_rng(seed)
    rows = subjects * days
    log_odds = -1.0 + signal * rng.normal(size=rows)
    happened = rng.random(rows) < 1 / (1 + np.exp(-(log_odds + shift)))
    shown = log_odds if not inverted else rng.permutation(log_odds)
    times = [START + timedelta(days=number % days) for number in range(rows)]
    people = [number // days for number in range(rows)]
    return pl.DataFrame(
        {
            "prediction_id": [f"id{number}" for number in range(rows)],
            "patient_id": [f"P{number:03d}" for number in people],
            "predicted_at": times,
            "index_time": pl.Series(times, dtype=pl.Datetime("us", "UTC")),
            "probability": 1 / (1 + np.exp(-shown)),
            "outcome": happened.astype(int),
            "site": [f"S{number % 3}" for number in people],
            "sex": ["FM"[number % 2] for number in people],
            "arm": ["placebo"] * rows,
        }
    )


def at_training(seed: int = 99) -> Evaluation:
    rows = outcomes(seed, subjects=200)
    return evaluate(rows["outcome"], rows["probability"], rows["patient_id"], replicates=200)


BASELINE = at_training()


def test_a_model_that_does_as_at_training_is_ok() -> None:
    alarms = [assess(outcomes(seed), PROFILE, BASELINE, replicates=200).status for seed in range(12)]
    assert alarms.count("degraded") <= 1
    found = assess(outcomes(1), PROFILE, BASELINE, replicates=200)
    assert found.status == "ok"
    assert found.current is not None
    assert found.current.span == "current"
    assert found.current.end - found.current.start == 4 * PROFILE.target.horizon


@pytest.mark.parametrize(("change", "reason"), [({"inverted": True}, "AUROC"), ({"shift": 1.5}, "underestimated"),
                                                ({"shift": -1.5}, "overestimated")])  # fmt: skip
def test_a_model_that_does_worse_is_degraded_and_says_how(change: dict[str, Any], reason: str) -> None:
    found = assess(outcomes(2, **change), PROFILE, BASELINE, replicates=200)
    assert found.status == "degraded"
    assert reason in " ".join(found.reasons)


def test_the_drop_is_that_to_the_baseline() -> None:
    found = assess(outcomes(3, inverted=True), PROFILE, BASELINE, replicates=200)
    result = found.result()
    assert result["drop"] == pytest.approx(BASELINE.auroc.value - result["auroc"]["value"])
    assert 0 < result["drop_lower"] < result["drop"]


@pytest.mark.parametrize("kind", ["none", "few", "no events", "one subject"])
def test_too_few_outcomes_are_no_verdict(kind: str) -> None:
    rows = outcomes(4)
    rows = {
        "none": rows.clear(), "few": rows.head(20), "no events": rows.with_columns(outcome=0),
        "one subject": rows.with_columns(patient_id=pl.lit("P")).with_columns(
            index_time=pl.col("index_time") + pl.duration(seconds=pl.int_range(pl.len()))
        ),
    }[kind]  # fmt: skip
    found = assess(rows, PROFILE, BASELINE, replicates=100)
    assert found.status == "insufficient_data"
    assert found.reasons
    assert found.result()["auroc"] is None


def test_all_outcomes_decide_where_the_newest_window_has_too_few() -> None:
    rows = outcomes(5).with_columns(
        index_time=pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.lit(START + timedelta(days=100)))
        .otherwise(pl.col("index_time"))
    )
    found = assess(rows, PROFILE, BASELINE, replicates=100)
    assert found.current is not None
    assert found.current.span == "all"
    assert found.status == "ok"


def test_without_a_baseline_the_verdict_says_so() -> None:
    found = assess(outcomes(6), PROFILE, None, replicates=100)
    assert (found.status, found.drop) == ("ok", None)
    assert "no evaluation" in found.reasons[0]


def test_asking_again_does_not_weigh_twice() -> None:
    rows = outcomes(7)
    again = rows.with_columns(
        prediction_id=pl.col("prediction_id") + "again", predicted_at=pl.col("predicted_at") + timedelta(hours=1)
    )
    assert one_a_feature_row(pl.concat([rows, again])).height == rows.height
    both = assess(pl.concat([rows, again]), PROFILE, BASELINE, replicates=100)
    assert both.result() == assess(rows, PROFILE, BASELINE, replicates=100).result()


def test_table_rows_have_the_table_s_columns_and_hide_small_groups() -> None:
    rows = outcomes(8).with_columns(
        site=pl.when(pl.col("patient_id") == "P000").then(pl.lit("alone")).otherwise(pl.col("site"))
    )
    common = {"trial": PROFILE.name, "model_name": "m", "model_version": "1", "run_id": "r", "computed_at": START,
              "as_of": START}  # fmt: skip
    found = table_rows(assess(rows, PROFILE, BASELINE, replicates=100), common)
    assert all(set(row) <= set(MODEL_PERFORMANCE_COLUMNS) for row in found)
    (alone,) = [row for row in found if row["value"] == "alone" and row["span"] == "current"]
    assert alone["rows"] is None
    assert alone.get("auroc") is None
    assert alone["note"]
    whole = next(row for row in found if row["span"] == "all" and row["attribute"] == "all")
    assert whole["mean_probability"] == pytest.approx(rows["probability"].mean())


def test_windows_follow_each_other_and_are_bounded() -> None:
    rows = outcomes(9, days=200, subjects=10)
    series = [w for w in assess(rows, PROFILE, None, replicates=100).windows if w.span == "window"]
    assert len(series) == MAX_WINDOWS
    assert all(a.end == b.start for a, b in itertools.pairwise(series))
    assert series[-1].end == rows["index_time"].max()
