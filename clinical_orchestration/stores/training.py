"""What the main pipeline and the retraining pipeline share: the training set, its record in MLflow, its evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clinical_orchestration import __version__
from clinical_orchestration.stores.registry import (
    EVALUATION_FILE,
    ModelNotFoundError,
    ModelRegistry,
    TrainingRecord,
)
from clinical_orchestration.tables import FEATURES, TRAINING_SET, silver

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.modeling.results import Evaluation
    from clinical_orchestration.modeling.train import Parameters, TrainingData
    from clinical_orchestration.stores.tables import TableStore
    from clinical_orchestration.trials import TrialProfile

SEED = 20250101
FOLDS = 5
CROSS_VALIDATION_FILE = "cross_validation.npz"
LABEL_DOMAINS = ("patient_vitals", "adverse_events", "subjects")
SOURCES = (FEATURES, *(silver(domain) for domain in LABEL_DOMAINS))
"""The tables that labelled rows are made from."""


class NoFeaturesError(LookupError):
    """There is no table of features yet."""


def source_versions(tables: TableStore) -> dict[str, int | None]:
    """Return the Delta version of each table that labelled rows are made from; None where it is absent."""
    return {name: tables.version(name) for name in SOURCES}


def labelled_rows(tables: TableStore, profile: TrialProfile) -> pl.DataFrame:
    """Return the labelled rows of a trial as they are now, see :func:`features.labels.training_rows`.

    Raises:
        NoFeaturesError: no features were computed yet.
    """
    import polars as pl

    from clinical_orchestration.features.labels import last_records, training_rows
    from clinical_orchestration.stores.feature_store import read_features

    if not tables.exists(FEATURES):
        raise NoFeaturesError("there are no features yet; materialize gold/patient_features first")

    def frame(name: str, columns: list[str] | None = None) -> pl.DataFrame:
        rows = tables.read(name, columns=columns, filters=[("trial", "=", profile.name)])
        return pl.DataFrame(pl.from_arrow(rows))

    return training_rows(
        read_features(tables, profile),
        frame(silver("adverse_events")),
        frame(silver("subjects")),
        last_records(frame(silver("patient_vitals"), ["patient_id", "event_time"])),
        profile,
    )


def write_training_set(
    tables: TableStore, profile: TrialProfile, rows: pl.DataFrame, metadata: Mapping[str, str]
) -> int:
    """Make `rows` the trial's training set and return the Delta version; other trials' rows stay as they are."""
    return tables.replace(
        TRAINING_SET,
        rows.to_arrow(),
        predicate=f"trial = '{profile.name}'",
        metadata={"trial": profile.name, **metadata},
    )


def read_training_set(tables: TableStore, trial: str, version: int) -> pl.DataFrame:
    """Return a trial's training set as it was at a Delta version.

    Raises:
        LookupError: the table or the version does not exist (any more).
    """
    import polars as pl

    if not tables.exists(TRAINING_SET):
        raise LookupError(f"there is no table {TRAINING_SET}")
    try:
        found = tables.read(TRAINING_SET, filters=[("trial", "=", trial)], version=version)
    except Exception as error:  # what a store raises for a version that was cleaned away differs by engine
        raise LookupError(f"{TRAINING_SET} has no version {version} any more ({type(error).__name__})") from error
    return pl.DataFrame(pl.from_arrow(found))


def training_record(
    tables: TableStore,
    profile: TrialProfile,
    data: TrainingData,
    *,
    fingerprint: str,
    candidate: str,
    training_set_version: int,
    parameters: Parameters | None = None,
    extra_params: Mapping[str, str | int | float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> TrainingRecord:
    """Return what MLflow is told about a training run.

    Args:
        tables: for versions and row counts.
        profile: the trial.
        data: the rows that the final model was fitted on.
        fingerprint: of the run.
        candidate: the chosen candidate.
        training_set_version: Delta version of ``gold/training_set``.
        parameters: hyper-parameters other than the defaults.
        extra_params: further parameters, such as the share of held-out subjects.
        tags: further tags.
    """
    from clinical_orchestration.features.definitions import feature_set_id
    from clinical_orchestration.modeling.train import hyper_parameters

    versions = {**source_versions(tables), TRAINING_SET: training_set_version}
    return TrainingRecord(
        trial=profile.name,
        fingerprint=fingerprint,
        candidate=candidate,
        feature_names=tuple(data.feature_names),
        feature_set=feature_set_id(profile),
        training_set_uri=tables.uri(TRAINING_SET),
        training_set_version=training_set_version,
        training_set_digest=data.digest(),
        table_versions={name: number for name, number in versions.items() if number is not None},
        row_counts={**{name: tables.row_count(name) for name in SOURCES}, "training_rows": data.rows},
        params={
            **hyper_parameters(parameters),
            "seed": SEED,
            "folds": FOLDS,
            "target": profile.target.name,
            **(extra_params or {}),
        },
        profile=profile.model_dump(mode="json"),
        code_version=__version__,
        tags=dict(tags or {}),
    )


def stored_evaluation(registry: ModelRegistry, run_id: str) -> Evaluation | None:
    """Return the evaluation of a run; None where it has none that can be read."""
    from clinical_orchestration.modeling.results import Evaluation

    try:
        return Evaluation.from_dict(json.loads(registry.read_file(run_id, EVALUATION_FILE)))
    except (ModelNotFoundError, ValueError):
        return None  # the run stopped between training and evaluation


def evaluate_run(registry: ModelRegistry, run_id: str, profile: TrialProfile) -> Evaluation:
    """Evaluate the out-of-fold probabilities of a training run, with plots and tables, and store it with the run.

    Raises:
        ModelNotFoundError: the run has no cross-validation.
    """
    from clinical_orchestration.modeling import plots
    from clinical_orchestration.modeling.evaluate import curves, evaluate
    from clinical_orchestration.modeling.train import CrossValidation

    result = CrossValidation.from_bytes(registry.read_file(run_id, CROSS_VALIDATION_FILE))
    probabilities = result.chosen_probabilities
    evaluation = evaluate(
        result.labels,
        probabilities,
        result.subjects,
        groups=result.groups,
        thresholds={"medium_risk": profile.risk_bands.medium, "high_risk": profile.risk_bands.high},
        seed=SEED,
    )
    drawn = curves(result.labels, probabilities, result.subjects, seed=SEED)
    registry.log_evaluation(
        run_id,
        evaluation,
        figures=plots.all_plots(result, evaluation, drawn),
        reports={
            "evaluation.md": "\n\n".join(
                [
                    plots.evaluation_table(evaluation),
                    plots.candidates_table(result),
                    plots.groups_table(evaluation),
                    plots.operating_points_table(evaluation),
                    plots.importance_table(result.importance),
                ]
            )
        },
    )
    return evaluation
