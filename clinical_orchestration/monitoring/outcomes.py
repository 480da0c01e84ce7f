"""What followed a prediction: joined once its horizon has passed and was observed, by the rules of the training labels.

The index time of a prediction is the time its features hold, else the time it was made. Its outcome is 1 when an
adverse event of the patient starts in ``(index, index + horizon]``, as :mod:`clinical_orchestration.features.labels`
says for training rows: onsets known to the day or better, the whole horizon observed, the patient treated and alive at
the index time. Nothing after the horizon has a say.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from clinical_orchestration.features.labels import label_onsets, observation
from clinical_orchestration.tables import PREDICTION_OUTCOMES_COLUMNS

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.trials import TrialProfile

PREDICTION_COLUMNS = (
    "prediction_id", "predicted_at", "trial", "patient_id", "model_name", "model_version", "probability", "risk_band",
    "feature_time",
)  # fmt: skip
"""Columns of ``gold/predictions`` that the join needs."""


@dataclass(frozen=True)
class OutcomeCounts:
    """What became of the predictions that had no outcome before; each is in exactly one of these.

    Attributes:
        determined: have an outcome now.
        events: of those, how many had the event.
        waiting: their horizon has not passed yet.
        censored: their horizon has passed, but observation ended before; more records may still lead to an outcome.
        out_of_scope: made for a time before the first dose or after death: no model is trained on such.
        unknown_patient: no patient was named, or none the trial knows: they never have an outcome.
    """

    determined: int
    events: int
    waiting: int
    censored: int
    out_of_scope: int
    unknown_patient: int

    @property
    def total(self) -> int:
        """All predictions that were looked at."""
        return self.determined + self.waiting + self.censored + self.out_of_scope + self.unknown_patient


def join_outcomes(
    predictions: pl.DataFrame,
    adverse_events: pl.DataFrame,
    subjects: pl.DataFrame,
    records: pl.DataFrame,
    profile: TrialProfile,
    *,
    now: datetime,
    recorded_at: datetime,
) -> tuple[pl.DataFrame, OutcomeCounts]:
    """Return the outcomes that are known at `now`: rows of ``gold/prediction_outcomes``, and what became of the rest.

    Args:
        predictions: rows of ``gold/predictions`` (:data:`PREDICTION_COLUMNS`) without an outcome so far; other trials'
            rows are left out, and a prediction id that comes twice counts once.
        adverse_events: rows of ``silver/adverse_events``.
        subjects: rows of ``silver/subjects``.
        records: patient_id and last_record, see :func:`clinical_orchestration.features.labels.last_records`.
        profile: the trial.
        now: the trial's present (UTC); a horizon that ends later has not passed.
        recorded_at: wall clock, kept with each row.
    """
    import polars as pl

    horizon = profile.target.horizon
    index = pl.col("index_time")
    joined = (
        predictions.filter(pl.col("trial") == profile.name)
        .unique("prediction_id", keep="first", maintain_order=True)
        .select(PREDICTION_COLUMNS)
        .with_columns(index_time=pl.coalesce("feature_time", "predicted_at"))
        .with_columns(horizon_end=index + horizon)
        .join(
            observation(subjects, records, profile).with_columns(known=pl.lit(True)),
            on="patient_id",
            how="left",
        )
        .with_columns(known=pl.col("known").fill_null(False))
    )
    outside = (index < pl.col("observed_from")).fill_null(False) | (index >= pl.col("death_time")).fill_null(False)
    state = (
        pl.when(~pl.col("known"))
        .then(pl.lit("unknown_patient"))
        .when(outside)
        .then(pl.lit("out_of_scope"))
        .when(pl.col("horizon_end") > now)
        .then(pl.lit("waiting"))
        .when(pl.col("observed_until").is_null() | (pl.col("horizon_end") > pl.col("observed_until")))
        .then(pl.lit("censored"))
        .otherwise(pl.lit("determined"))
    )
    joined = joined.with_columns(state=state)
    # the first onset after the index time is enough to know whether there is one within the horizon
    outcomes = (
        joined.filter(pl.col("state") == "determined")
        .sort("index_time", "prediction_id")
        .join_asof(
            label_onsets(adverse_events, profile).with_columns(next_onset=pl.col("onset")),
            left_on="index_time",
            right_on="onset",
            by="patient_id",
            strategy="forward",
            allow_exact_matches=False,
            check_sortedness=False,  # both are sorted by time; polars cannot see that within groups
        )
        .with_columns(outcome=(pl.col("next_onset") <= pl.col("horizon_end")).fill_null(False))
        .with_columns(
            outcome=pl.col("outcome").cast(pl.Int32),
            event_time=pl.when("outcome").then("next_onset"),
            recorded_at=pl.lit(recorded_at, dtype=pl.Datetime("us", "UTC")),
        )
        .select(*PREDICTION_OUTCOMES_COLUMNS)
        .sort("index_time", "prediction_id")
    )
    tally = dict(joined.group_by("state").len().iter_rows())
    counts = OutcomeCounts(
        determined=outcomes.height,
        events=int(outcomes["outcome"].sum()),
        waiting=tally.get("waiting", 0),
        censored=tally.get("censored", 0),
        out_of_scope=tally.get("out_of_scope", 0),
        unknown_patient=tally.get("unknown_patient", 0),
    )
    return outcomes, counts


def in_scope(rows: pl.DataFrame, subjects: pl.DataFrame, records: pl.DataFrame, profile: TrialProfile) -> pl.DataFrame:
    """Return the rows of subjects who were under observation at the row's ``feature_time``, as training rows are.

    The horizon need not have passed. Adds ``start``: first dose, or the first record's feature time where none is
    known; and site, sex, arm.

    Args:
        rows: with patient_id and feature_time, such as those of ``gold/patient_features``.
        subjects: rows of ``silver/subjects``.
        records: patient_id and last_record.
        profile: the trial.
    """
    import polars as pl

    t = pl.col("feature_time")
    return (
        rows.join(observation(subjects, records, profile), on="patient_id", how="inner")
        .filter(
            (pl.col("observed_from").is_null() | (t >= pl.col("observed_from")))
            & (t <= pl.col("observed_until"))
            & (pl.col("death_time").is_null() | (t < pl.col("death_time")))
        )
        .with_columns(start=pl.coalesce("observed_from", t.min().over("patient_id")))
        .drop("observed_from", "observed_until", "death_time")
    )
