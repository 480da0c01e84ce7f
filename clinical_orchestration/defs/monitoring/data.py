"""What the monitoring steps read: the champion, its reference, current rows, predictions and their outcomes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.stores.registry import ModelRegistry, ModelVersionInfo
from clinical_orchestration.stores.tables import TableStore, TransactionMovedError
from clinical_orchestration.tables import (
    DOMAINS,
    FEATURE_KEY_COLUMNS,
    PREDICTION_OUTCOMES,
    PREDICTION_OUTCOMES_COLUMNS,
    PREDICTIONS,
    TRAINING_SET,
    silver,
)
from clinical_orchestration.trials import TrialProfile
from clinical_orchestration.trials.clock import trial_now

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.modeling.results import Evaluation
    from clinical_orchestration.monitoring.drift import Sample
    from clinical_orchestration.monitoring.outcomes import OutcomeCounts

MAX_PREDICTIONS = 5_000
"""Drift in what the model is asked about is looked for in the newest so many predictions."""
MAX_ROWS = 100_000
"""Of current feature rows, the newest so many are compared (about 2.5 KB each)."""
_ATTEMPTS = 3


@dataclass(frozen=True)
class Truth:
    """The silver rows that say what happened, and the trial's present."""

    adverse_events: "pl.DataFrame"
    subjects: "pl.DataFrame"
    records: "pl.DataFrame"
    now: datetime
    wall: datetime


@dataclass(frozen=True)
class Populations:
    """The reference and what is compared with it; `why` says what is missing where there is no reference.

    `features` and `predictions` are None where there are no such rows.
    """

    reference: "Sample | None"
    features: "Sample | None" = None
    predictions: "Sample | None" = None
    features_are: str = ""
    why: str = ""


def read_truth(tables: TableStore, profile: TrialProfile) -> Truth:
    """Return the trial's adverse events, subjects and last records, and what time it is there."""
    import polars as pl

    from clinical_orchestration.features.labels import last_records

    vitals = _frame(tables, silver("patient_vitals"), profile, ["patient_id", "event_time"])
    events, subjects = (_frame(tables, silver(domain), profile) for domain in ("adverse_events", "subjects"))
    wall = datetime.now(UTC)
    newest: list[datetime] = []
    for domain in DOMAINS:
        times = vitals if domain == "patient_vitals" else _frame(tables, silver(domain), profile, ["event_time"])
        last = times.select(pl.col("event_time").max()).item()
        if isinstance(last, datetime):
            newest.append(last)
    return Truth(events, subjects, last_records(vitals), trial_now(profile, max(newest, default=None), wall), wall)


def baseline_of(registry: ModelRegistry, champion: ModelVersionInfo) -> "Evaluation | None":
    """Return the champion's evaluation at training; None where its run has none that can be read."""
    from clinical_orchestration.stores.registry import ModelFormatError, ModelNotFoundError

    try:
        return registry.evaluation_of(champion)
    except (ModelNotFoundError, ModelFormatError):
        return None


def record_outcomes(tables: TableStore, profile: TrialProfile, truth: Truth) -> "OutcomeCounts":
    """Write the outcomes that have become known since the last call, each prediction's once.

    Two runs at once cannot write the same outcome: each append states how many there were before it.

    Raises:
        TransactionMovedError: other runs kept writing outcomes.
    """
    app = f"outcomes:{profile.name}"
    attempt = 1
    while True:
        written = tables.transaction_version(PREDICTION_OUTCOMES, app)
        _, outcomes, counts = _outcomes(tables, profile, truth)
        if outcomes.is_empty():
            tables.ensure(PREDICTION_OUTCOMES)
            return counts
        try:
            tables.append(
                PREDICTION_OUTCOMES,
                outcomes.to_arrow(),
                transactions={app: (written or 0) + outcomes.height},
                expected={app: written},
                metadata={"writer": "model monitoring", "trial": profile.name},
            )
        except TransactionMovedError:  # another run was faster: look again at what is left
            if attempt == _ATTEMPTS:
                raise
            attempt += 1
        else:
            return counts


def outcomes_of(tables: TableStore, profile: TrialProfile, champion: ModelVersionInfo, truth: Truth) -> "pl.DataFrame":
    """Return the outcomes of the champion's own predictions, recorded or not yet: other versions are kept apart."""
    import polars as pl

    recorded, known, _ = _outcomes(tables, profile, truth)
    return pl.concat([recorded, known], how="vertical_relaxed").filter(
        (pl.col("model_name") == champion.name) & (pl.col("model_version") == champion.version)
    )


def _outcomes(
    tables: TableStore, profile: TrialProfile, truth: Truth
) -> "tuple[pl.DataFrame, pl.DataFrame, OutcomeCounts]":
    """Return the outcomes that are recorded, those that have become known since, and what became of the rest."""
    import polars as pl

    from clinical_orchestration.monitoring.outcomes import PREDICTION_COLUMNS, join_outcomes

    recorded = _frame(tables, PREDICTION_OUTCOMES, profile, list(PREDICTION_OUTCOMES_COLUMNS))
    undecided = _frame(tables, PREDICTIONS, profile, list(PREDICTION_COLUMNS)).filter(
        ~pl.col("prediction_id").is_in(recorded["prediction_id"].implode())
    )
    known, counts = join_outcomes(
        undecided,
        truth.adverse_events,
        truth.subjects,
        truth.records,
        profile,
        now=truth.now,
        recorded_at=truth.wall,
    )
    return recorded, known, counts


def read_populations(
    tables: TableStore, profile: TrialProfile, champion: ModelVersionInfo, truth: Truth
) -> Populations:
    """Return the rows the champion was trained on, the current feature rows, and the rows it was asked about."""
    import polars as pl

    from clinical_orchestration.features.definitions import counted_days, feature_names
    from clinical_orchestration.monitoring.drift import MIN_SUBJECTS
    from clinical_orchestration.monitoring.outcomes import in_scope
    from clinical_orchestration.monitoring.performance import WINDOW_HORIZONS
    from clinical_orchestration.stores.feature_store import read_rows

    names = feature_names(profile)
    training = _training_rows(tables, profile, champion)
    if training is None or training.is_empty():
        return Populations(
            None,
            why=f"the training set of version {champion.version} (Delta version {champion.training_set_version} of "
            f"{TRAINING_SET}) cannot be read any more; train a new version",
        )
    keys = in_scope(
        read_rows(tables, profile, list(FEATURE_KEY_COLUMNS)), truth.subjects, truth.records, profile
    ).select(*FEATURE_KEY_COLUMNS, "start")
    starts = keys.group_by("patient_id").agg(pl.col("start").first())
    reference = replace(
        _sample(training.join(starts, on="patient_id", how="left"), [n for n in names if n in training.columns]),
        counted_days=counted_days(profile),
    )
    since = pl.col("feature_time") > training["feature_time"].max()
    horizons = pl.col("feature_time") > truth.now - WINDOW_HORIZONS * profile.target.horizon
    chosen, what = keys.filter(since & horizons), "rows newer than the training set"
    if chosen["patient_id"].n_unique() < MIN_SUBJECTS:
        chosen, what = keys, "all rows: too few subjects have rows newer than the training set"
    chosen = chosen.sort("feature_time", "patient_id").tail(MAX_ROWS)
    rows = read_rows(tables, profile, [*FEATURE_KEY_COLUMNS, *names], chosen["feature_date"].unique().to_list()).join(
        chosen.select("patient_id", "feature_time", "start"), on=["patient_id", "feature_time"], how="inner"
    )
    return Populations(
        reference,
        _sample(rows, names) if rows.height else None,
        _asked(tables, profile, champion, truth, starts, names),
        what,
    )


def _training_rows(tables: TableStore, profile: TrialProfile, champion: ModelVersionInfo) -> "pl.DataFrame | None":
    """Return the champion's training set; None where its version of the table is not stored any more."""
    import polars as pl
    from deltalake.exceptions import DeltaError

    if champion.training_set_version is None or not tables.exists(TRAINING_SET):
        return None
    try:
        rows = tables.read(TRAINING_SET, filters=[("trial", "=", profile.name)], version=champion.training_set_version)
    except (DeltaError, OSError, IndexError):
        return None
    return pl.DataFrame(pl.from_arrow(rows))


def _asked(
    tables: TableStore,
    profile: TrialProfile,
    champion: ModelVersionInfo,
    truth: Truth,
    starts: "pl.DataFrame",
    names: Sequence[str],
) -> "Sample | None":
    """Return the features of the champion's newest predictions.

    Of known patients only those made for a time under observation count: of other times the model never saw a row.
    Requests without a patient each count as a subject of their own.
    """
    import polars as pl

    from clinical_orchestration.monitoring.outcomes import in_scope

    mine = [("trial", "=", profile.name), ("model_name", "=", champion.name), ("model_version", "=", champion.version)]
    columns = ["prediction_id", "patient_id", "predicted_at", "feature_time"]
    made = (
        pl.DataFrame(pl.from_arrow(tables.read(PREDICTIONS, columns=columns, filters=mine)))
        .sort("predicted_at", "prediction_id")
        .tail(MAX_PREDICTIONS)
    )
    if made.is_empty():
        return None
    # the features of a prediction are kilobytes: only those of these are read
    since = [*mine, ("predicted_at", ">=", made["predicted_at"].min())]
    given = tables.read(PREDICTIONS, columns=["prediction_id", "features"], filters=since)
    made = (
        made.unique("prediction_id", keep="last", maintain_order=True)
        .join(pl.DataFrame(pl.from_arrow(given)).unique("prediction_id"), on="prediction_id", how="left")
        .with_columns(feature_time=pl.coalesce("feature_time", "predicted_at"))
    )
    known = (
        in_scope(
            made.filter(pl.col("patient_id").is_not_null()).unique(
                ["patient_id", "feature_time"], keep="last", maintain_order=True
            ),
            truth.subjects,
            truth.records,
            profile,
        )
        .select("patient_id", "feature_time", "features")
        .join(starts, on="patient_id", how="left")
    )
    unnamed = made.filter(pl.col("patient_id").is_null()).select(
        pl.concat_str(pl.lit("request "), "prediction_id").alias("patient_id"),
        "feature_time",
        "features",
        pl.lit(None, dtype=pl.Datetime("us", "UTC")).alias("start"),
    )
    rows = pl.concat([known, unnamed], how="vertical_relaxed")
    if rows.is_empty():
        return None
    parsed = [_features(text) for text in rows["features"].to_list()]
    values = {name: pl.Series(name, [row.get(name) for row in parsed], pl.Float64, strict=False) for name in names}
    return _sample(rows.drop("features").with_columns(**values), names)


def _features(text: str | None) -> dict[str, Any]:
    """Return a prediction's features; none where they cannot be read."""
    import orjson

    try:
        found = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _sample(rows: "pl.DataFrame", names: Sequence[str]) -> "Sample":
    import numpy as np
    import polars as pl

    from clinical_orchestration.monitoring.drift import Sample

    values = rows.select(pl.col(name).cast(pl.Float64) for name in names).to_numpy()
    subjects = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1].reshape(-1)
    days = rows.select((pl.col("feature_time") - pl.col("start")).dt.total_seconds() / 86_400).to_series()
    time = pl.col("feature_time").dt
    hours = rows.select((time.hour().cast(pl.Float64) + time.minute() / 60).fill_null(float("nan"))).to_series()
    return Sample(
        tuple(names),
        np.asarray(values, dtype=np.float64),
        subjects.astype(np.int64),
        days.cast(pl.Float64).fill_null(float("nan")).to_numpy(),
        hours.to_numpy(),
    )


def _frame(tables: TableStore, name: str, profile: TrialProfile, columns: list[str] | None = None) -> "pl.DataFrame":
    import polars as pl

    return pl.DataFrame(pl.from_arrow(tables.read(name, columns=columns, filters=[("trial", "=", profile.name)])))
