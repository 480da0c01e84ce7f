"""MLflow experiment, training set, candidate models, evaluation and registered version."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration import __version__
from clinical_orchestration.defs.common import asset_key, spec, step
from clinical_orchestration.defs.results import find_result, materialized, result_of
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.registry import EXPERIMENT, ModelRegistry
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.stores.training import (
    CROSS_VALIDATION_FILE,
    FOLDS,
    SEED,
    NoFeaturesError,
    evaluate_run,
    labelled_rows,
    source_versions,
    stored_evaluation,
    training_record,
    write_training_set,
)
from clinical_orchestration.tables import FEATURES, TRAINING_SET
from clinical_orchestration.trials import TrialProfile

if TYPE_CHECKING:
    import polars as pl

GROUP = "training"
MLFLOW_EXPERIMENT = "models/experiment"
CANDIDATES = "models/candidates"
EVALUATION = "models/evaluation"
REGISTERED_VERSION = "models/registered_version"
PLOTS = ("roc.png", "precision_recall.png", "calibration.png", "feature_importance.png")


@step(
    specs=[
        spec(
            MLFLOW_EXPERIMENT,
            f"The MLflow experiment `{EXPERIMENT}`, where every training run of every trial is logged.",
            group=GROUP,
            kinds={"mlflow"},
            deps=[FEATURES],
        )
    ],
    pool="mlflow_operations",
)
def setup_mlflow_experiment(
    pipeline: PipelineResource, registry: dg.ResourceParam[ModelRegistry]
) -> dg.MaterializeResult[Any]:
    """Create the experiment, or restore it when somebody deleted it."""
    experiment_id = registry.ensure_experiment(EXPERIMENT)
    return materialized(
        asset_key(MLFLOW_EXPERIMENT),
        pipeline.profile().name,
        {"experiment_id": experiment_id},
        {
            "experiment": EXPERIMENT,
            "experiment_id": experiment_id,
            "mlflow": dg.MetadataValue.url(f"{registry.tracking_uri}/#/experiments/{experiment_id}"),
        },
    )


@step(
    specs=[
        spec(
            TRAINING_SET,
            "The labelled rows a model is trained on: features at a time on treatment whose whole horizon was "
            "observed, and whether an adverse event started within it.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[FEATURES, MLFLOW_EXPERIMENT],
        ),
        spec(
            CANDIDATES,
            "Logistic regression, random forest, XGBoost and their soft vote, cross-validated with subjects kept "
            "together; the best one, fitted on all rows, is logged to MLflow.",
            group=GROUP,
            kinds={"scikitlearn", "xgboost", "mlflow"},
            deps=[FEATURES, MLFLOW_EXPERIMENT],
        ),
    ],
    pool="model_training",
)
def train_model(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Train unless the same rows, parameters and code gave a model before."""
    profile = pipeline.profile()
    experiment_id = result_of(context, asset_key(MLFLOW_EXPERIMENT), profile.name)["experiment_id"]
    inputs = _inputs(tables, profile)
    kept = find_result(context, asset_key(CANDIDATES), profile.name) if pipeline.flag("keep_model") else None
    done = None if pipeline.flag("force_training") else _done_before(context, registry, profile, experiment_id, inputs)
    note = "nothing changed since the last training: its result is used"
    if kept is not None:
        note = "keep_model: the last training's result is used, whatever the tables hold now"
        context.log.info("The model of MLflow run %s is kept, as conf asks: no model is trained.", kept["run_id"])
        result, experiment_id, inputs = {**kept, "trained": False}, kept["experiment_id"], kept["inputs"]
    elif done is not None:
        context.log.info("The tables are as they were for MLflow run %s: no model is trained.", done["run_id"])
        result = {**done, "trained": False}
    else:
        result = _train_if_new(context, pipeline, tables, registry, experiment_id)
    result = {**result, "experiment_id": experiment_id, "inputs": inputs}
    counts = {
        "dagster/row_count": result["rows"],
        "subjects": result["subjects"],
        "events": result["events"],
        "prevalence": result["events"] / result["rows"],
        "features": result["features"],
        "target": profile.target.name,
    }
    yield materialized(
        asset_key(TRAINING_SET),
        profile.name,
        {"version": result["training_set_version"], "rows": result["rows"]},
        {**counts, "uri": tables.uri(TRAINING_SET), "delta_version": result["training_set_version"]},
    )
    yield materialized(
        asset_key(CANDIDATES),
        profile.name,
        result,
        {
            **counts,
            "trained": result["trained"],
            "candidate": result["candidate"],
            "note": "trained" if result["trained"] else note,
            "mlflow_run": dg.MetadataValue.url(_run_url(registry, experiment_id, result["run_id"])),
        },
    )


def _inputs(tables: TableStore, profile: TrialProfile) -> dict[str, Any]:
    """Return what training depends on: the versions of its tables, the profile and the code."""
    import hashlib

    from clinical_orchestration.modeling.train import TRAINING_CODE_VERSION

    return {
        **source_versions(tables),
        "profile": hashlib.sha256(profile.model_dump_json().encode()).hexdigest(),
        "code": f"{__version__}/{TRAINING_CODE_VERSION}/{SEED}/{FOLDS}",
    }


def _done_before(
    context: dg.AssetExecutionContext,
    registry: ModelRegistry,
    profile: TrialProfile,
    experiment_id: str,
    inputs: dict[str, Any],
) -> dict[str, Any] | None:
    """Return the result of the last training when its inputs were these and MLflow still has its run."""
    last = find_result(context, asset_key(CANDIDATES), profile.name)
    if last is None or last.get("inputs") != inputs or last.get("experiment_id") != experiment_id:
        return None
    run = registry.find_run(experiment_id, last["fingerprint"])
    return last if run is not None and run.run_id == last["run_id"] else None


def _train_if_new(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: TableStore,
    registry: ModelRegistry,
    experiment_id: str,
) -> dict[str, Any]:
    from clinical_orchestration.features.definitions import feature_names
    from clinical_orchestration.modeling.train import TrainingData, TrainingDataError, fingerprint

    profile = pipeline.profile()
    rows = _training_rows(tables, profile)
    try:
        data = TrainingData.from_frame(rows, feature_names(profile))
    except TrainingDataError as error:
        raise dg.Failure(f"no training set for the trial {profile.name}: {error}", allow_retries=False) from error
    if not data.rows:
        raise dg.Failure(
            f"the trial {profile.name} has no training rows yet: no feature time on treatment whose whole "
            f"horizon was observed",
            allow_retries=False,
        )
    mark = fingerprint(data, trial=profile.name, seed=SEED, folds=FOLDS)
    run = None if pipeline.flag("force_training") else registry.find_run(experiment_id, mark)
    if run is not None:
        context.log.info("The training rows are those of MLflow run %s: no model is trained.", run.run_id)
        version, run_id, candidate = tables.version(TRAINING_SET), run.run_id, run.candidate
    else:
        version, run_id, candidate = _train(context, profile, tables, registry, rows, data, mark, experiment_id)
    return {
        "run_id": run_id,
        "candidate": candidate,
        "trained": run is None,
        "fingerprint": mark,
        "training_set_version": version,
        "rows": data.rows,
        "subjects": len(set(data.subjects.tolist())),
        "events": int(data.labels.sum()),
        "features": len(data.feature_names),
    }


def _training_rows(tables: TableStore, profile: TrialProfile) -> "pl.DataFrame":
    try:
        return labelled_rows(tables, profile)
    except NoFeaturesError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _train(
    context: dg.AssetExecutionContext,
    profile: TrialProfile,
    tables: TableStore,
    registry: ModelRegistry,
    rows: "pl.DataFrame",
    data: Any,
    mark: str,
    experiment_id: str,
) -> tuple[int, str, str]:
    from clinical_orchestration.modeling.train import TrainingDataError, cross_validate, fit_final

    version = write_training_set(tables, profile, rows, {"fingerprint": mark})
    context.log.info("Cross-validating on %d rows, %d features.", data.rows, len(data.feature_names))
    try:
        result = cross_validate(data, seed=SEED, folds=FOLDS)
        fitted = fit_final(data, name=result.chosen, seed=SEED)
    except TrainingDataError as error:
        raise dg.Failure(f"the trial {profile.name} cannot be trained on: {error}", allow_retries=False) from error
    record = training_record(
        tables,
        profile,
        data,
        fingerprint=mark,
        candidate=result.chosen,
        training_set_version=version,
        tags={"dagster_run_id": context.run.run_id},
    )
    run = registry.log_training(
        experiment_id,
        record,
        fitted.estimator,
        data.typical_row(),
        metrics=result.metrics(),
        files={CROSS_VALIDATION_FILE: result.to_bytes()},
    )
    return version, run.run_id, result.chosen


@step(
    specs=[
        spec(
            EVALUATION,
            "How good the chosen model is on subjects it never saw: AUROC, AUPRC, Brier score and calibration with 95 "
            "% intervals, overall and per site, sex and arm, with plots.",
            group=GROUP,
            kinds={"scikitlearn", "mlflow"},
            deps=[CANDIDATES],
        )
    ],
    pool="mlflow_operations",
)
def evaluate_model(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, registry: dg.ResourceParam[ModelRegistry]
) -> dg.MaterializeResult[Any]:
    """Evaluate the out-of-fold probabilities of the training run."""
    from clinical_orchestration.modeling import plots

    profile = pipeline.profile()
    trained = result_of(context, asset_key(CANDIDATES), profile.name)
    run_id, experiment_id = trained["run_id"], trained["experiment_id"]
    evaluation = None if trained["trained"] else stored_evaluation(registry, run_id)
    if evaluation is None:
        evaluation = evaluate_run(registry, run_id, profile)
    else:
        context.log.info("The evaluation of MLflow run %s is used as it is.", run_id)
    url = _run_url(registry, experiment_id, run_id)
    figures = {
        name: estimate.value
        for name, estimate in (
            ("auroc", evaluation.auroc),
            ("auprc", evaluation.auprc),
            ("brier", evaluation.brier),
            ("ece", evaluation.ece),
        )
        if estimate.value is not None
    }
    return materialized(
        asset_key(EVALUATION),
        profile.name,
        {
            "run_id": run_id,
            "experiment_id": experiment_id,
            "candidate": trained["candidate"],
            **figures,
            "intervals": {
                name: [getattr(evaluation, name).lower, getattr(evaluation, name).upper]
                for name in ("auroc", "auprc", "brier", "ece")
            },
        },
        {
            **figures,
            "metrics": dg.MetadataValue.md(plots.evaluation_table(evaluation)),
            "groups": dg.MetadataValue.md(plots.groups_table(evaluation)),
            **{name.removesuffix(".png"): dg.MetadataValue.url(f"{url}/artifacts/plots/{name}") for name in PLOTS},
            "mlflow_run": dg.MetadataValue.url(url),
        },
    )


@step(
    specs=[
        spec(
            REGISTERED_VERSION,
            "The model version in MLflow's registry, with its evaluation, fingerprint and training set as tags. "
            "The same fingerprint is never registered twice.",
            group=GROUP,
            kinds={"mlflow"},
            deps=[EVALUATION],
        )
    ],
    pool="mlflow_operations",
)
def register_model(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, registry: dg.ResourceParam[ModelRegistry]
) -> dg.MaterializeResult[Any]:
    """Register the evaluated model."""
    profile = pipeline.profile()
    evaluated = result_of(context, asset_key(EVALUATION), profile.name)
    evaluation = stored_evaluation(registry, evaluated["run_id"])
    if evaluation is None:
        raise dg.Failure(f"MLflow run {evaluated['run_id']} has no evaluation", allow_retries=False)
    before = {item.version for item in registry.versions(profile.model_name)}
    info = registry.register(
        profile.model_name,
        evaluated["run_id"],
        evaluation,
        description=f"{evaluated['candidate']} for {profile.title}; target {profile.target.name}",
    )
    new = info.version not in before
    if not new:
        context.log.info("%s version %s holds this model already.", info.name, info.version)
    return materialized(
        asset_key(REGISTERED_VERSION),
        profile.name,
        {"model_name": info.name, "version": info.version, "run_id": info.run_id, "new": new},
        {
            "model": info.name,
            "version": info.version,
            "uri": info.uri,
            "new_version": new,
            "registry": dg.MetadataValue.url(f"{registry.tracking_uri}/#/models/{info.name}/versions/{info.version}"),
        },
    )


def _run_url(registry: ModelRegistry, experiment_id: str, run_id: str) -> str:
    return f"{registry.tracking_uri}/#/experiments/{experiment_id}/runs/{run_id}"
