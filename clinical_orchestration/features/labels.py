"""Labelled training rows: which feature rows can be learned from, and what followed them.

The label of a row at t is 1 when an adverse event of the patient starts in ``(t, t + horizon]``. Only onsets that are
known to the day or better count; an onset on the day of the visit itself is not later than the visit's feature time
(the end of that day), so it is history, never a label.

A row is eligible when

- the patient is a subject who was treated, and t is not before the first dose (trials observed until their
  last record may lack a first dose: then every row counts, except those of screen failures);
- the whole horizon was observed: ``t + horizon`` is not after the end of treatment, or, for ``last_record``, not after
  the patient's last record. A positive label does not excuse an unobserved rest: that would favour positives;
- the patient was alive at t.

The label may use records received at any later time; the features never do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.trials import TrialProfile

LABEL = "label"
SUBGROUP_COLUMNS = ("site", "sex", "arm")
DAY_OR_BETTER = ("day", "minute", "second")


def label_onsets(adverse_events: pl.DataFrame, profile: TrialProfile) -> pl.DataFrame:
    """Return the distinct onsets that can be labels: patient_id, onset; sorted by onset.

    Args:
        adverse_events: rows of ``silver/adverse_events``; other trials' rows are left out.
        profile: the trial.
    """
    import polars as pl

    return (
        adverse_events.filter(
            (pl.col("trial") == profile.name)
            & pl.col("event_time").is_not_null()
            # a record without a stated precision is a message, which carries a full timestamp
            & pl.col("onset_precision").fill_null("second").is_in(DAY_OR_BETTER)
        )
        .select("patient_id", pl.col("event_time").alias("onset"))
        .unique()
        .sort("onset", "patient_id")
    )


def last_records(*tables: pl.DataFrame) -> pl.DataFrame:
    """Return each patient's last event time over silver `tables`: patient_id, last_record."""
    import polars as pl

    return (
        pl.concat([table.select("patient_id", "event_time") for table in tables])
        .group_by("patient_id")
        .agg(pl.col("event_time").max().alias("last_record"))
    )


def observation(subjects: pl.DataFrame, records: pl.DataFrame, profile: TrialProfile) -> pl.DataFrame:
    """Return one row a patient: observed_from, observed_until, death_time, site, sex, arm.

    Args:
        subjects: rows of ``silver/subjects``; of several records of a patient the last received one counts.
        records: patient_id and last_record, see :func:`last_records`; needed for ``last_record`` profiles.
        profile: the trial.
    """
    import polars as pl

    columns = ["patient_id", "site", "sex", "arm", "actual_arm", "treatment_start", "treatment_end", "death_time",
               "screen_failure"]  # fmt: skip
    people = (
        subjects.filter(pl.col("trial") == profile.name)
        .sort("received_at", "source_position")
        .unique("patient_id", keep="last", maintain_order=True)
        .select(columns)
        .with_columns(arm=pl.coalesce("actual_arm", "arm"))
        .drop("actual_arm")
    )
    if profile.observed_until == "treatment_end":
        return people.filter(pl.col("treatment_start").is_not_null()).select(
            "patient_id",
            pl.col("treatment_start").alias("observed_from"),
            pl.col("treatment_end").alias("observed_until"),
            "death_time",
            *SUBGROUP_COLUMNS,
        )
    return (
        records.join(people, on="patient_id", how="left")
        .filter(~pl.col("screen_failure").fill_null(False))
        .select(
            "patient_id",
            pl.col("treatment_start").alias("observed_from"),
            pl.col("last_record").alias("observed_until"),
            "death_time",
            *SUBGROUP_COLUMNS,
        )
    )


def training_rows(
    features: pl.DataFrame,
    adverse_events: pl.DataFrame,
    subjects: pl.DataFrame,
    records: pl.DataFrame,
    profile: TrialProfile,
) -> pl.DataFrame:
    """Return the eligible feature rows with their label: keys, features, label (0 or 1), site, sex, arm.

    `arm` is the arm as treated where it is known, else as planned: for comparing groups, not a feature.
    Rows are sorted by patient and time, so that equal input gives equal folds.

    Args:
        features: rows of ``gold/patient_features``; other trials' rows are left out.
        adverse_events: rows of ``silver/adverse_events``.
        subjects: rows of ``silver/subjects``.
        records: patient_id and last_record, see :func:`last_records`; may be empty unless the profile's
            ``observed_until`` is ``last_record``.
        profile: the trial.
    """
    import polars as pl

    horizon = profile.target.horizon
    t = pl.col("feature_time")
    eligible = (
        features.filter(pl.col("trial") == profile.name)
        .join(observation(subjects, records, profile), on="patient_id", how="inner")
        .filter(
            (pl.col("observed_from").is_null() | (t >= pl.col("observed_from")))
            & (t + horizon <= pl.col("observed_until"))
            & (pl.col("death_time").is_null() | (t < pl.col("death_time")))
        )
        .sort("feature_time", "patient_id")
    )
    # the first onset after t is enough to know whether there is one by t + horizon
    labelled = eligible.join_asof(
        label_onsets(adverse_events, profile).with_columns(next_onset=pl.col("onset")),
        left_on="feature_time",
        right_on="onset",
        by="patient_id",
        strategy="forward",
        allow_exact_matches=False,
        check_sortedness=False,  # both are sorted by time; polars cannot see that within groups
    )
    label = (pl.col("next_onset") <= t + horizon).fill_null(False).cast(pl.Int32).alias(LABEL)
    return labelled.select(*FEATURE_KEY_COLUMNS, *feature_names(profile), label, *SUBGROUP_COLUMNS).sort(
        "patient_id", "feature_time"
    )
