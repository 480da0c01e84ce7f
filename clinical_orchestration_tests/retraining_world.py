"""A small trial with labelled rows, an MLflow registry in a file and a model server that only counts: for retraining.

The registry is the real one on MLflow's own database file, so that promotion and rollback are those of production.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from clinical_orchestration.modeling.watch import ServingSample
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration.stores.serving import ServingUnavailableError
from clinical_orchestration.tables import (
    FEATURES,
    PREDICTION_OUTCOMES,
    PREDICTION_OUTCOMES_COLUMNS,
    PREDICTIONS,
    PREDICTIONS_COLUMNS,
    SILVER_COLUMNS,
    arrow_schema,
    silver,
)
from clinical_orchestration.trials import TrialProfile, load_trial
from clinical_orchestration_tests.fakes import InMemoryTableStore, RecordingNotifier

START = datetime(2025, 1, 1, tzinfo=UTC)
PROFILE = """
name: small
title: Small trial
study_id: SMALL01
model_name: {model_name}
sources: {{}}
features:
  times: {{kind: visit}}
  windows: {{7d: 7d}}
  vitals:
    heart_rate: {{codes: [HR]}}
  labs: [ALT]
  lab_trend_window: 30d
target: {{name: adverse_event_7d, horizon: 7d}}
observed_until: treatment_end
clock: data
promotion: {{min_auroc: 0.62, min_auprc_lift: 1.2, max_calibration_error: 0.2, max_auroc_drop: 0.02}}
risk_bands: {{medium: 0.25, high: 0.5}}
online: {{max_age: 35d}}
"""


@dataclass
class CountingServer:
    """Stands for the model server: serves whatever the registry says, and counts what a test sets."""

    registry: ModelRegistry
    model_name: str
    url: str = "http://model-server"
    up: bool = True
    failing: bool = False
    served: str | None = None
    answers: float = 0.0
    failures: float = 0.0
    latency: tuple[tuple[float, float], ...] = field(default=())

    def _version(self) -> str | None:
        if self.served is None and not self.failing:
            champion = self.registry.champion(self.model_name)
            return None if champion is None else champion.version
        return self.served

    def sample(self, trial: str) -> ServingSample:
        if not self.up:
            raise ServingUnavailableError("the model server does not answer /metrics")
        return ServingSample(self._version(), self.failing, self.answers, self.failures, self.latency)

    def await_version(self, trial: str, version: str, *, timeout_seconds: float = 60.0) -> float | None:
        if not self.up:
            raise ServingUnavailableError("the model server does not answer /health")
        return 0.1 if self._version() == version else None


class World:
    """Tables, registry, server and alerts of one small trial."""

    def __init__(self, folder: Path, registry: ModelRegistry, name: str) -> None:
        self.file = folder / f"{name}.yaml"
        self.file.write_text(PROFILE.format(model_name=name))
        self.profile: TrialProfile = load_trial(str(self.file))
        self.registry = registry
        self.tables = InMemoryTableStore()
        self.alerts = RecordingNotifier()
        self.server = CountingServer(registry, name)
        self.instance = dg.DagsterInstance.ephemeral()

    def fill(
        self, subjects: int = 90, visits: int = 8, *, seed: int = 1, signal: float = 1.6, base: float = -1.0,
        shuffled: bool = False, first_subject: int = 0, days_later: int = 0,
    ) -> None:  # fmt: skip
        """Add subjects whose events depend on their heart rate; `shuffled` breaks every tie between the two."""
        from clinical_orchestration.features.definitions import feature_names

        rng = np.random.default_rng(seed)
        names = feature_names(self.profile)
        features: list[dict[str, Any]] = []
        people: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        vitals: list[dict[str, Any]] = []
        begin = START + timedelta(days=days_later)
        outcomes: list[tuple[str, datetime, bool]] = []
        for number in range(first_subject, first_subject + subjects):
            patient = f"SECRET-{number:04d}"
            people.append(
                self._silver("subjects", patient, begin, f"dm#{number}", site=f"S{number % 4}", sex="FM"[number % 2],
                             arm="placebo", actual_arm="placebo", treatment_start=begin, screen_failure=False,
                             treatment_end=begin + timedelta(days=14 * visits))
            )  # fmt: skip
            vitals.append(self._silver("patient_vitals", patient, begin, f"vs#{number}", test_code="HR", value=70.0))
            for visit in range(visits):
                when = begin + timedelta(days=14 * visit, hours=23)
                risk = float(rng.normal())
                row = {name: float(rng.normal()) for name in names}
                row[names[0]] = risk
                features.append(
                    {"trial": self.profile.name, "patient_id": patient, "feature_time": when,
                     "feature_date": when.date(), **row}
                )  # fmt: skip
                outcomes.append((patient, when, bool(rng.random() < 1 / (1 + np.exp(-(base + signal * risk))))))
        happened = np.array([event for _, _, event in outcomes])
        if shuffled:
            rng.shuffle(happened)
        for number, ((patient, when, _), event) in enumerate(zip(outcomes, happened, strict=True)):
            if event:
                events.append(
                    self._silver("adverse_events", patient, when + timedelta(days=2), f"ae{seed}#{number}",
                                 event_type="RASH", severity="grade_2", onset_precision="second")
                )  # fmt: skip
        for table, rows in (("subjects", people), ("adverse_events", events), ("patient_vitals", vitals)):
            self.tables.append(silver(table), pa.Table.from_pylist(rows, schema=arrow_schema(SILVER_COLUMNS[table])))
        self.tables.append(FEATURES, pa.Table.from_pylist(features))

    def empty(self) -> None:
        """Take away every record; what models were trained on stays."""
        for table in (FEATURES, *(silver(domain) for domain in ("subjects", "adverse_events", "patient_vitals"))):
            self.tables.replace(table, self.tables.read(table).slice(0, 0))

    def _silver(self, table: str, patient: str, when: datetime, position: str, **values: Any) -> dict[str, Any]:
        return {
            **dict.fromkeys(SILVER_COLUMNS[table]), "trial": self.profile.name, "patient_id": patient,
            "event_time": when, "received_at": when, "source": "test", "source_position": position,
            "ingested_at": when, "record_key": position, "content_hash": position, **values,
        }  # fmt: skip

    def resources(self, **conf: Any) -> dict[str, Any]:
        return {
            "pipeline": PipelineResource(trial=str(self.file), conf=conf),
            "tables": self.tables,
            "registry": self.registry,
            "serving": self.server,
            "alerts": self.alerts,
        }

    def run(self, **conf: Any) -> dg.ExecuteInProcessResult:
        """Execute the whole job."""
        from clinical_orchestration.defs import retraining

        name = "scheduled_retraining"
        job = dg.define_asset_job(name, dg.AssetSelection.groups("retraining"), executor_def=dg.in_process_executor)
        definitions = dg.Definitions(assets=retraining.ASSETS, jobs=[job], resources=self.resources(**conf))
        resolved = definitions.resolve_job_def(name)
        # a failing step is tried again after five minutes: no test waits for that
        for node in resolved.graph.nodes:
            node.definition._retry_policy = None  # type: ignore[attr-defined]
        return resolved.execute_in_process(instance=self.instance)

    def monitored(self, result: dict[str, Any]) -> None:
        """Report a result of the step check_model_performance."""
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(
                dg.AssetKey(["monitoring", "performance"]),
                metadata={"trial": self.profile.name, "result": dg.MetadataValue.json(result)},
            )
        )

    def predicted(
        self, version: str, labels: list[int], probabilities: list[float], rows: list[dict[str, float]]
    ) -> None:
        """Store predictions of a version with their outcomes, four of each subject."""
        when = START + timedelta(days=400)
        ids = [f"p{number}" for number in range(len(labels))]
        common = {"trial": self.profile.name, "model_name": self.profile.model_name, "model_version": version}
        predictions = [
            {**dict.fromkeys(PREDICTIONS_COLUMNS), **common, "prediction_id": i, "predicted_at": when, "probability": p,
             "patient_id": f"SECRET-{n // 4}", "features": json.dumps(row)}
            for n, (i, p, row) in enumerate(zip(ids, probabilities, rows, strict=True))
        ]  # fmt: skip
        outcomes = [
            {**dict.fromkeys(PREDICTION_OUTCOMES_COLUMNS), **common, "prediction_id": i, "probability": p, "outcome": y,
             "patient_id": f"SECRET-{n // 4}", "predicted_at": when}
            for n, (i, p, y) in enumerate(zip(ids, probabilities, labels, strict=True))
        ]  # fmt: skip
        for table, columns, found in (
            (PREDICTIONS, PREDICTIONS_COLUMNS, predictions),
            (PREDICTION_OUTCOMES, PREDICTION_OUTCOMES_COLUMNS, outcomes),
        ):
            self.tables.append(table, pa.Table.from_pylist(found, schema=arrow_schema(columns)))

    def train_champion(self) -> str:
        """Retrain once and return the champion's version."""
        result = self.run()
        assert result.success
        champion = self.registry.champion(self.profile.model_name)
        assert champion is not None
        return champion.version


def result_of(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    """Return the JSON result that a step left."""
    for event in result.get_asset_materialization_events():
        if event.asset_key is not None and event.asset_key.path == key.split("/"):
            value = event.materialization.metadata["result"].value
            assert isinstance(value, dict)
            return value
    raise AssertionError(f"{key} was not materialized")


def skipped_steps(result: dg.ExecuteInProcessResult) -> set[str]:
    """Return the steps that were skipped."""
    return {event.step_key for event in result.all_events if event.is_step_skipped and event.step_key}
