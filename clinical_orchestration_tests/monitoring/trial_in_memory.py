"""A small simulated trial in memory: silver, features, a champion's training set, predictions. The truth is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import polars as pl

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.features.labels import last_records, training_rows
from clinical_orchestration.modeling.evaluate import evaluate
from clinical_orchestration.modeling.results import Evaluation
from clinical_orchestration.stores.registry import ModelNotFoundError, ModelVersionInfo
from clinical_orchestration.tables import (
    FEATURES,
    PREDICTIONS,
    PREDICTIONS_COLUMNS,
    SILVER_COLUMNS,
    TRAINING_SET,
    arrow_schema,
    silver,
)
from clinical_orchestration.trials import TrialProfile, load_trial
from clinical_orchestration_tests.fakes import InMemoryTableStore

START = datetime(2025, 1, 1, tzinfo=UTC)
PROFILE = load_trial("simulated")
SUBJECTS = 60
DAYS = 8


@dataclass
class FakeRegistry:
    """The part of the model registry that monitoring asks."""

    tracking_uri: str = "memory://mlflow"
    info: ModelVersionInfo | None = None
    evaluation: Evaluation | None = None

    def champion(self, model_name: str) -> ModelVersionInfo | None:
        return self.info

    def evaluation_of(self, version: ModelVersionInfo) -> Evaluation:
        if self.evaluation is None:
            raise ModelNotFoundError("none")
        return self.evaluation


def version(
    number: str = "1", training_set_version: int | None = 1, profile: TrialProfile = PROFILE
) -> ModelVersionInfo:
    return ModelVersionInfo(
        name=profile.model_name, version=number, run_id="run", trial=profile.name, fingerprint="f",
        candidate="ensemble", feature_set="s", training_set_version=training_set_version, promoted=True,
        aliases=("champion",), created_at=START, tags={},
    )  # fmt: skip


@dataclass
class Trial:
    """Everything a test may bend before it is stored."""

    features: pl.DataFrame
    events: list[tuple[str, datetime]]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    until: datetime = START + timedelta(days=DAYS)

    def subjects(self) -> list[str]:
        return sorted(self.features["patient_id"].unique().to_list())

    def silver_frames(self) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Adverse events, subjects, vitals."""
        people = self.subjects()
        events = [
            _row("adverse_events", patient, at, i, event_type="HEADACHE")
            for i, (patient, at) in enumerate(e for e in self.events if e[1] <= self.until)
        ]
        subjects = [
            _row("subjects", patient, START, i, site=f"S{i % 4}", sex="FM"[i % 2], arm=("placebo", "active")[i % 3 > 0],
                 treatment_start=START, screen_failure=False)
            for i, patient in enumerate(people)
        ]  # fmt: skip
        vitals = [
            _row("patient_vitals", patient, at, i, test_code="HR", value=70.0, unit="beats/min")
            for i, patient in enumerate(people)
            for at in (START, self.until)
        ]
        return tuple(  # type: ignore[return-value]
            pl.DataFrame(rows, schema_overrides=_polars(domain), schema=list(SILVER_COLUMNS[domain]))
            for domain, rows in (("adverse_events", events), ("subjects", subjects), ("patient_vitals", vitals))
        )

    def store(self, tables: Any = None, *, train_until: datetime = START + timedelta(days=4)) -> Any:
        """Write everything; the training set holds the rows whose horizon had passed at `train_until`.

        `tables` is where to (default: a new store in memory).
        """
        tables = InMemoryTableStore() if tables is None else tables
        frames = dict(zip(("adverse_events", "subjects", "patient_vitals"), self.silver_frames(), strict=True))
        for domain, frame in frames.items():
            tables.append(silver(domain), frame.to_arrow())
        tables.append(FEATURES, self.features.to_arrow())
        past = self.features.filter(pl.col("feature_time") <= train_until - PROFILE.target.horizon)
        rows = training_rows(
            past, frames["adverse_events"], frames["subjects"], last_records(frames["patient_vitals"]), PROFILE
        )
        tables.replace(TRAINING_SET, rows.to_arrow(), predicate=f"trial = '{PROFILE.name}'")
        self.add_predictions(tables, self.predictions)
        return tables

    def add_predictions(self, tables: Any, rows: list[dict[str, Any]]) -> None:
        if rows:
            import pyarrow as pa

            tables.append(PREDICTIONS, pa.Table.from_pylist(rows, schema=arrow_schema(PREDICTIONS_COLUMNS)))

    def grow(self, until: datetime) -> Trial:
        return replace(self, until=until)


def make_trial(seed: int = 0, *, subjects: int = SUBJECTS, predicted: bool = True, event_log_odds: float = -1.0,
               later_shift: float = 0.0) -> Trial:  # fmt: skip
    """Return a trial whose events follow from ``heart_rate_latest``, from half-way with `later_shift` (log odds)."""
    rng = np.random.default_rng(seed)
    names = feature_names(PROFILE)
    times = [START + timedelta(hours=6 * (k + 1)) for k in range(DAYS * 4)]
    rows = subjects * len(times)
    values = {
        name: rng.normal(size=rows) for name in names if not name.startswith(("on_treatment", "day_in", "days_since"))
    }
    patients = np.repeat([f"P{n:04d}" for n in range(subjects)], len(times))
    moments = times * subjects
    values |= {name: 70 + 5 * rng.normal(size=rows) for name in names if name.startswith("heart_rate_")}
    values |= {name: 120 + 5 * rng.normal(size=rows) for name in names if name.startswith("systolic_bp_")}
    values |= {name: 80 + 4 * rng.normal(size=rows) for name in names if name.startswith("diastolic_bp_")}
    values |= {name: 37 + 0.3 * rng.normal(size=rows) for name in names if name.startswith("temperature_")}
    values |= {name: 96 + rng.normal(size=rows) for name in names if name.startswith("spo2_")}
    days = np.array([(moment - START).total_seconds() / 86_400 for moment in moments])
    values |= {name: days for name in names if name in ("day_in_trial", "days_since_enrolment")}
    values |= {"on_treatment": np.ones(rows)}
    features = pl.DataFrame(
        {
            "trial": [PROFILE.name] * rows,
            "patient_id": patients,
            "feature_time": pl.Series(moments, dtype=pl.Datetime("us", "UTC")),
            "feature_date": [moment.date() for moment in moments],
            **{name: values.get(name, np.full(rows, 1.0)) for name in names},
        }
    )
    risk = event_log_odds + 1.2 * (values["heart_rate_latest"] - 70) / 5
    # one chance a day: the row at midday decides about the 24 hours after it
    decides = np.array([moment.hour == 12 for moment in moments])
    shifted = risk + later_shift * (days > DAYS / 2)
    happens = decides & (rng.random(rows) < 1 / (1 + np.exp(-shifted)))
    events = [(str(patients[i]), moments[i] + timedelta(hours=8)) for i in np.flatnonzero(happens)]
    predictions = []
    if predicted:
        table = features.select(names).to_numpy()
        predictions = [
            prediction(
                f"id{i:06d}", str(patients[i]), moments[i], float(1 / (1 + np.exp(-risk[i]))),
                features=dict(zip(names, table[i].tolist(), strict=True)),
            )
            for i in np.flatnonzero(decides)
        ]  # fmt: skip
    return Trial(features, events, predictions)


def prediction(identity: str, patient: str | None, feature_time: datetime | None, probability: float = 0.3, *,
               model_version: str = "1", features: dict[str, float] | None = None,
               predicted_at: datetime | None = None) -> dict[str, Any]:  # fmt: skip
    at = predicted_at or (feature_time or START) + timedelta(minutes=1)
    return {
        "prediction_id": identity, "predicted_at": at, "prediction_date": at.date(), "trial": PROFILE.name,
        "patient_id": patient, "model_name": PROFILE.model_name, "model_version": model_version,
        "probability": probability, "risk_band": "medium", "feature_time": feature_time, "feature_age_seconds": 60.0,
        "stale": False, "features": orjson.dumps(features or {}).decode(),
    }  # fmt: skip


def baseline(trial: Trial, seed: int = 0) -> Evaluation:
    """Return the evaluation that the true risks would have had at training."""
    rows = [row for row in trial.predictions if row["feature_time"] < START + timedelta(days=DAYS / 2)]
    events = set(trial.events)
    labels = [int((row["patient_id"], row["feature_time"] + timedelta(hours=8)) in events) for row in rows]
    return evaluate(
        labels, [row["probability"] for row in rows], [row["patient_id"] for row in rows], seed=seed, replicates=200
    )


def _row(domain: str, patient: str, at: datetime, number: int, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(SILVER_COLUMNS[domain]) | {
        "trial": PROFILE.name, "patient_id": patient, "event_time": at, "received_at": at, "source": "test",
        "source_position": f"{domain}-0-{number}", "ingested_at": at, "record_key": f"{domain}{number}",
        "content_hash": "c", **values,
    }  # fmt: skip


def _polars(domain: str) -> dict[str, Any]:
    kinds = {"string": pl.String, "double": pl.Float64, "boolean": pl.Boolean, "timestamp": pl.Datetime("us", "UTC")}
    return {name: kinds[kind] for name, kind in SILVER_COLUMNS[domain].items()}
