"""Retraining when conditions ask for it: a challenger, its comparison with the champion, promotion or refusal."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.deployment.assets import CHAMPION
from clinical_orchestration.defs.results import materialized, newest_result, result_of
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.champion_watch import Watched, bounds_of, rollback_key, watch_champion
from clinical_orchestration.stores.registry import (
    EXPERIMENT,
    PROMOTION_TAG,
    TRAINING_ROWS_TAG,
    ModelNotFoundError,
    ModelRegistry,
    ModelVersionInfo,
)
from clinical_orchestration.stores.serving import ServingClient, ServingUnavailableError, answers_with
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.stores.training import (
    CROSS_VALIDATION_FILE,
    FOLDS,
    SEED,
    NoFeaturesError,
    evaluate_run,
    labelled_rows,
    read_training_set,
    source_versions,
    stored_evaluation,
    training_record,
    write_training_set,
)
from clinical_orchestration.tables import FEATURES, TRAINING_SET
from clinical_orchestration.trials import TrialProfile

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.modeling.compare import Comparison
    from clinical_orchestration.modeling.retraining import Facts
    from clinical_orchestration.modeling.train import Floats

GROUP = "retraining"
DECISION = "retraining/decision"
REQUESTED = "retraining/requested"
NOT_NEEDED = "retraining/not_needed"
SKIPPED = "retraining/skipped"
RETRAINING_SET = "retraining/training_set"
CHALLENGER = "retraining/challenger"
EVALUATION = "retraining/evaluation"
COMPARISON = "retraining/comparison"
DEPLOYMENT = "retraining/deployment"
OUTCOME = "retraining/outcome"

PERFORMANCE = "monitoring/performance"
DATA_DRIFT = "monitoring/data_drift"
CONCEPT_DRIFT = "monitoring/concept_drift"

HOLDOUT_FILE = "holdout.npz"
HOLDOUT_EVALUATION_FILE = "holdout_evaluation.json"
COMPARISON_FILE = "comparison.json"
SEARCH_FILE = "hpo/trials.json"
SEARCH_PLOT = "hpo/search.png"
MAX_TRIALS = 500
_DAY = timedelta(days=1)


# --------------------------------------------------------------------------------------------------------- conditions


@step(
    specs=[
        spec(
            DECISION,
            "Whether the model is trained anew, and why: new labelled rows, age of the champion, data drift, concept "
            "drift, performance on outcomes, or because somebody asks.",
            group=GROUP,
            kinds={"mlflow"},
            deps=[FEATURES, CHAMPION],
        ),
        spec(
            REQUESTED,
            "Marks the branch that retrains; absent where no condition is met.",
            group=GROUP,
            kinds={"python"},
            deps=[FEATURES, CHAMPION],
            skippable=True,
        ),
        spec(
            NOT_NEEDED,
            "Marks the branch that keeps the champion as it is; absent where a condition is met.",
            group=GROUP,
            kinds={"python"},
            deps=[FEATURES, CHAMPION],
            skippable=True,
        ),
    ],
    pool="monitoring_tasks",
)
def check_retraining_conditions(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Decide, and go one of the two ways."""
    from clinical_orchestration.modeling.retraining import Bounds, decide_retraining

    profile, variables = pipeline.profile(), pipeline.variables()
    facts = _facts(context, pipeline, tables, registry)
    bounds = Bounds(variables.model_retraining_interval_days, variables.retraining_min_new_share)
    decision = decide_retraining(facts, bounds)
    for reason in decision.reasons:
        context.log.info("%s: %s", "retrain" if decision.retrain else "skip", reason)
    rows = [(c.name, c.met, _cell(c.value), _cell(c.bound), c.description) for c in decision.conditions]
    yield materialized(
        asset_key(DECISION),
        profile.name,
        {**decision.to_dict(), "champion": facts.champion_version, "rows": facts.rows},
        {
            "retrain": decision.retrain,
            "reasons": "; ".join(decision.reasons),
            "conditions": markdown_table(("condition", "met", "value", "bound", "what"), rows),
            "champion_version": facts.champion_version or "none",
        },
    )
    branch = REQUESTED if decision.retrain else NOT_NEEDED
    yield materialized(asset_key(branch), profile.name, {"reasons": list(decision.reasons)})


def _cell(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, tables: TableStore, registry: ModelRegistry
) -> "Facts":
    from clinical_orchestration.modeling.retraining import Facts

    profile = pipeline.profile()
    try:
        rows = labelled_rows(tables, profile).height
    except NoFeaturesError:
        rows = 0
    requested, forced = str(pipeline.conf.get("reason") or "")[:200], pipeline.flag("force")
    champion = registry.champion(profile.model_name)
    if champion is None:
        return Facts(rows=rows, requested=requested, forced=forced)
    params = _params(registry, champion)
    trained_on = {name: params.get(f"delta_version/{name}") for name in source_versions(tables)}
    now_there = {name: str(number) for name, number in source_versions(tables).items() if number is not None}
    since = champion.promoted_at or champion.created_at

    def found(key: str) -> dict[str, Any]:
        """Return what monitoring found since this version is champion; what it found before was about another one."""
        newest = newest_result(context.instance, asset_key(key), profile.name)
        if newest is None or newest[1] < since:
            return {}
        version = newest[0].get("model_version")
        return {} if version is not None and str(version) != champion.version else newest[0]

    drift, concept, performance = found(DATA_DRIFT), found(CONCEPT_DRIFT), found(PERFORMANCE)
    return Facts(
        rows=rows,
        champion_version=champion.version,
        champion_age_days=(datetime.now(UTC) - champion.created_at) / _DAY,
        champion_rows=_whole(
            champion.tags.get(TRAINING_ROWS_TAG) or params.get("rows/training_rows") or champion.tags.get("rows")
        ),
        rows_changed=any(now_there.get(name) != version for name, version in trained_on.items()),
        data_drift=drift.get("status"),
        drifted_share=_share(drift.get("share_drifted")),
        concept_drift=concept.get("status"),
        performance=performance.get("status"),
        performance_drop=_share(performance.get("drop")),
        requested=requested,
        forced=forced,
    )


def _params(registry: ModelRegistry, version: ModelVersionInfo) -> dict[str, str]:
    try:
        return registry.run_params(version.run_id)
    except ModelNotFoundError:
        return {}  # the run was deleted: nothing is known about it


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@step(
    specs=[
        spec(
            SKIPPED,
            "The decision not to retrain, with its reasons: the champion stays.",
            group=GROUP,
            kinds={"python"},
            deps=[NOT_NEEDED],
        )
    ],
    pool="monitoring_tasks",
)
def skip_retraining(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult[Any]:
    """Say why nothing is trained."""
    trial = pipeline.profile().name
    decided = result_of(context, asset_key(DECISION), trial)
    reasons = "; ".join(decided["reasons"])
    context.log.info("No retraining: %s", reasons)
    return materialized(
        asset_key(SKIPPED),
        trial,
        {"skipped": True, "reasons": decided["reasons"], "champion": decided["champion"]},
        {"reasons": reasons, "champion_version": decided["champion"] or "none"},
    )


# ----------------------------------------------------------------------------------------------------------- training


@step(
    specs=[
        spec(
            RETRAINING_SET,
            "The labelled rows of now, in `gold/training_set`, with the subjects that are held out to compare models: "
            "a subject is held out or not for ever, by a hash.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[FEATURES, REQUESTED],
        )
    ],
    pool="feature_engineering",
)
def prepare_training_data(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, tables: dg.ResourceParam[TableStore]
) -> dg.MaterializeResult[Any]:
    """Write the training set and say who is held out."""
    profile = pipeline.profile()
    share = pipeline.variables().retraining_holdout_share
    try:
        rows = labelled_rows(tables, profile)
    except NoFeaturesError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    if rows.is_empty():
        raise dg.Failure(
            f"the trial {profile.name} has no labelled rows; run clinical_data_pipeline first", allow_retries=False
        )
    version = write_training_set(tables, profile, rows, {"retraining_run": context.run.run_id})
    training, held_out = _split(rows, profile.name, share)
    parts = [("training", training), ("held out", held_out)]
    counts = [
        (name, part.height, part["patient_id"].n_unique(), int(part["label"].sum() or 0),
         round(float(part["label"].sum() or 0) / max(1, part.height), 4))
        for name, part in parts
    ]  # fmt: skip
    return materialized(
        asset_key(RETRAINING_SET),
        profile.name,
        {
            "version": version,
            "rows": rows.height,
            "holdout_share": share,
            "holdout_seed": SEED,
            **{f"{key}_{name.replace(' ', '_')}": value for name, *values in counts
               for key, value in zip(("rows", "subjects", "events"), values, strict=False)},
        },
        {
            "dagster/row_count": rows.height,
            "uri": tables.uri(TRAINING_SET),
            "delta_version": version,
            "parts": markdown_table(("part", "rows", "subjects", "events", "prevalence"), counts),
            "target": profile.target.name,
        },
    )  # fmt: skip


def _split(rows: "pl.DataFrame", trial: str, share: float) -> tuple["pl.DataFrame", "pl.DataFrame"]:
    """Return the rows of subjects to train on, and of those held out."""
    import polars as pl

    from clinical_orchestration.modeling.holdout import held_out_subjects

    held = held_out_subjects(trial, rows["patient_id"].unique().to_list(), share=share, seed=SEED)
    outside = pl.col("patient_id").is_in(sorted(held))
    return rows.filter(~outside), rows.filter(outside)


@step(
    specs=[
        spec(
            CHALLENGER,
            "The challenger: candidate (and hyper-parameters, where a search is asked for) chosen on the training "
            "subjects alone; fitted on them for the comparison, and on all rows for use; logged to MLflow.",
            group=GROUP,
            kinds={"scikitlearn", "xgboost", "mlflow"},
            deps=[RETRAINING_SET],
        )
    ],
    pool="model_training",
)
def retrain_model(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.MaterializeResult[Any]:
    """Train a challenger, unless the same rows, settings and code gave one before."""
    from clinical_orchestration.features.definitions import feature_names
    from clinical_orchestration.modeling.train import TrainingData, TrainingDataError, fingerprint

    profile = pipeline.profile()
    prepared = result_of(context, asset_key(RETRAINING_SET), profile.name)
    trials = _trials(pipeline)
    rows = read_training_set(tables, profile.name, prepared["version"])
    try:
        data = TrainingData.from_frame(rows, feature_names(profile))
    except TrainingDataError as error:
        raise dg.Failure(f"the trial {profile.name} cannot be trained on: {error}", allow_retries=False) from error
    mark = fingerprint(
        data, trial=profile.name, seed=SEED, folds=FOLDS,
        extra={"retraining": 1, "holdout_share": prepared["holdout_share"], "hpo_trials": trials},
    )  # fmt: skip
    experiment_id = registry.ensure_experiment(EXPERIMENT)
    run = None if pipeline.flag("force_training") else registry.find_run(experiment_id, mark)
    found: dict[str, Any] = {}
    if run is not None:
        context.log.info("The same rows and settings gave MLflow run %s: no model is trained.", run.run_id)
        run_id, candidate = run.run_id, run.candidate
    else:
        run_id, candidate, found = _train(
            context, pipeline, tables, registry, rows, data, prepared, trials, mark, experiment_id
        )
    url = f"{registry.tracking_uri}/#/experiments/{experiment_id}/runs/{run_id}"
    return materialized(
        asset_key(CHALLENGER),
        profile.name,
        {
            "run_id": run_id,
            "experiment_id": experiment_id,
            "candidate": candidate,
            "fingerprint": mark,
            "trained": run is None,
            "training_set_version": prepared["version"],
            "rows": data.rows,
            "hpo_trials": trials,
            **found,
        },
        {
            "dagster/row_count": data.rows,
            "candidate": candidate,
            "trained": run is None,
            "hpo_trials": trials,
            **found,
            **({"search": dg.MetadataValue.url(f"{url}/artifacts/{SEARCH_PLOT}")} if trials else {}),
            "mlflow_run": dg.MetadataValue.url(url),
        },
    )


def _trials(pipeline: PipelineResource) -> int:
    asked = pipeline.conf.get("hpo_trials", pipeline.variables().hpo_trials)
    try:
        trials = int(asked)
    except (TypeError, ValueError):
        trials = -1
    if not 0 <= trials <= MAX_TRIALS or isinstance(asked, bool):
        raise dg.Failure(f"hpo_trials must be a whole number from 0 to {MAX_TRIALS}", allow_retries=False)
    return trials


def _train(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: TableStore,
    registry: ModelRegistry,
    rows: "pl.DataFrame",
    data: Any,
    prepared: dict[str, Any],
    trials: int,
    mark: str,
    experiment_id: str,
) -> tuple[str, str, dict[str, Any]]:
    import json

    from clinical_orchestration.modeling.train import TrainingData, TrainingDataError, cross_validate, fit_final
    from clinical_orchestration.modeling.tuning import search_plot, tune

    profile = pipeline.profile()
    training, held_out = _split(rows, profile.name, prepared["holdout_share"])
    found: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    metrics: dict[str, float] = {}
    parameters = None
    try:
        inside = TrainingData.from_frame(training, data.feature_names)
        if trials:
            search = tune(
                inside, trials=trials, seed=SEED, folds=FOLDS,
                timeout_seconds=pipeline.variables().hpo_timeout_seconds,
            )  # fmt: skip
            parameters = search.parameters
            files = {SEARCH_FILE: json.dumps(search.to_dict(), indent=1).encode(), SEARCH_PLOT: search_plot(search)}
            metrics = search.metrics()
            found = {"hpo_seconds": search.seconds, "hpo_stopped_by_time": search.stopped_by_time}
            context.log.info("The search took %.1f s for %d trials.", search.seconds, len(search.trials))
        result = cross_validate(inside, seed=SEED, folds=FOLDS, parameters=parameters)
        compared = fit_final(inside, name=result.chosen, seed=SEED, parameters=parameters)
        final = fit_final(data, name=result.chosen, seed=SEED, parameters=parameters)
    except TrainingDataError as error:
        raise dg.Failure(f"the trial {profile.name} cannot be trained on: {error}", allow_retries=False) from error
    record = training_record(
        tables,
        profile,
        data,
        fingerprint=mark,
        candidate=result.chosen,
        training_set_version=prepared["version"],
        parameters=parameters,
        extra_params={"holdout_share": prepared["holdout_share"], "hpo_trials": trials},
        tags={"dagster_run_id": context.run.run_id, "pipeline": "scheduled_retraining"},
    )
    run = registry.log_training(
        experiment_id,
        record,
        final.estimator,
        data.typical_row(),
        metrics={**result.metrics(), **metrics},
        files={
            **files,
            CROSS_VALIDATION_FILE: result.to_bytes(),
            HOLDOUT_FILE: _holdout_bytes(
                [] if held_out.is_empty() else compared.probabilities(_matrix(held_out, data.feature_names))
            ),
        },
    )
    return run.run_id, result.chosen, found


def _matrix(rows: "pl.DataFrame", names: tuple[str, ...]) -> Any:
    """Return features as a pandas frame; a feature that the rows lack is missing throughout."""
    import polars as pl

    ordered = rows.sort("patient_id", "feature_time")
    return ordered.select(
        [
            (pl.col(name) if name in rows.columns else pl.lit(None)).cast(pl.Float64).alias(name)
            for name in names
        ]
    ).to_pandas()  # fmt: skip


def _holdout_bytes(probabilities: "Floats | list[float]") -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=np.asarray(probabilities, dtype=np.float64))
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- evaluation, comparison


@step(
    specs=[
        spec(
            EVALUATION,
            "How good the challenger is: out-of-fold on the training subjects, which the floors of the promotion rule "
            "look at, and on the held-out subjects, which took part in no choice.",
            group=GROUP,
            kinds={"scikitlearn", "mlflow"},
            deps=[CHALLENGER],
        )
    ],
    pool="mlflow_operations",
)
def evaluate_retrained_model(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.MaterializeResult[Any]:
    """Evaluate the challenger and store the evaluation with its run."""
    import json

    from clinical_orchestration.modeling.evaluate import EvaluationError, evaluate
    from clinical_orchestration.modeling.plots import evaluation_table

    profile = pipeline.profile()
    trained = result_of(context, asset_key(CHALLENGER), profile.name)
    run_id = trained["run_id"]
    evaluation = None if trained["trained"] else stored_evaluation(registry, run_id)
    evaluation = evaluation or evaluate_run(registry, run_id, profile)
    labels, probabilities, subjects, _ = _held_out(context, pipeline, tables, registry)
    metadata: dict[str, Any] = {"out_of_fold": dg.MetadataValue.md(evaluation_table(evaluation))}
    figures: dict[str, Any] = {}
    note = ""
    try:
        on_held_out = evaluate(labels, probabilities, subjects, seed=SEED)
    except EvaluationError as error:
        note = f"the held-out subjects cannot be evaluated on: {error}"
        context.log.warning(note)
    else:
        metadata["held_out"] = dg.MetadataValue.md(evaluation_table(on_held_out))
        names = ("auroc", "auprc", "brier", "ece")
        figures = {name: getattr(on_held_out, name).value for name in names}
        registry.add_files(
            run_id,
            {HOLDOUT_EVALUATION_FILE: json.dumps(on_held_out.to_dict(), indent=1).encode()},
            metrics={f"holdout/{name}": value for name, value in figures.items() if value is not None},
        )
    known = {name: getattr(evaluation, name).value for name in ("auroc", "auprc", "brier", "ece")}
    return materialized(
        asset_key(EVALUATION),
        profile.name,
        {"run_id": run_id, "out_of_fold": known, "held_out": figures, "note": note},
        {**metadata, **{name: value for name, value in known.items() if value is not None},
         **({"note": note} if note else {})},
    )  # fmt: skip


def _held_out(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, tables: TableStore, registry: ModelRegistry
) -> "tuple[list[int], Floats, list[str], pl.DataFrame]":
    """Return labels, the challenger's probabilities, subjects and rows of the held-out subjects, in one order."""
    import io

    import numpy as np

    profile = pipeline.profile()
    prepared = result_of(context, asset_key(RETRAINING_SET), profile.name)
    trained = result_of(context, asset_key(CHALLENGER), profile.name)
    rows = read_training_set(tables, profile.name, prepared["version"])
    held_out = _split(rows, profile.name, prepared["holdout_share"])[1].sort("patient_id", "feature_time")
    with np.load(io.BytesIO(registry.read_file(trained["run_id"], HOLDOUT_FILE)), allow_pickle=False) as arrays:
        probabilities = np.asarray(arrays["probabilities"], dtype=np.float64)
    return held_out["label"].to_list(), probabilities, held_out["patient_id"].to_list(), held_out


@step(
    specs=[
        spec(
            COMPARISON,
            "Challenger and champion on the same held-out subjects: difference in AUROC, AUPRC and Brier score with a "
            "bootstrap over subjects, and the decision of the promotion rule.",
            group=GROUP,
            kinds={"scikitlearn", "mlflow"},
            deps=[EVALUATION],
        )
    ],
    pool="mlflow_operations",
)
def compare_models(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.MaterializeResult[Any]:
    """Compare, and decide by the promotion rule."""
    import json

    from clinical_orchestration.modeling.evaluate import EvaluationError
    from clinical_orchestration.modeling.plots import decision_table
    from clinical_orchestration.modeling.promotion import Decision, decide_paired

    profile = pipeline.profile()
    trained = result_of(context, asset_key(CHALLENGER), profile.name)
    run_id = trained["run_id"]
    evaluation = stored_evaluation(registry, run_id)
    if evaluation is None:
        raise dg.Failure(f"MLflow run {run_id} has no evaluation; start the run again", allow_retries=False)
    champion = registry.champion(profile.model_name)
    same = registry.find_version(profile.model_name, trained["fingerprint"])
    comparison: Comparison | None = None
    decision: Decision | None = None
    if same is not None and same.rolled_back:
        why = f"version {same.version} is the same model and was rolled back: it is not promoted again"
        decision = Decision(False, (why,), ())
    elif champion is not None:
        try:
            comparison = _compare(context, pipeline, tables, registry, champion)
        except EvaluationError as error:
            why = f"champion and challenger cannot be compared on the held-out subjects: {error}"
            decision = Decision(False, (why,), ())
    if decision is None:
        decision = decide_paired(evaluation, comparison, profile.promotion)
    metadata: dict[str, Any] = {"decision": decision.outcome, "reasons": "; ".join(decision.reasons)}
    if decision.checks:
        metadata["checks"] = dg.MetadataValue.md(decision_table(decision))
    if comparison is not None:
        registry.add_files(
            run_id, {COMPARISON_FILE: json.dumps(comparison.to_dict(), indent=1).encode()}, metrics=comparison.metrics()
        )
        metadata["comparison"] = _comparison_table(comparison)
        metadata["basis"] = comparison.basis
        metadata["held_out_subjects"] = comparison.subjects
        metadata["held_out_rows"] = comparison.rows
        metadata["rows_since"] = comparison.since or "all rows"
    context.log.info("The challenger: %s (%s)", decision.outcome, "; ".join(decision.reasons))
    return materialized(
        asset_key(COMPARISON),
        profile.name,
        {
            "run_id": run_id,
            "champion": None if champion is None else champion.version,
            "decision": decision.to_dict(),
            "comparison": None if comparison is None else comparison.to_dict(),
        },
        metadata,
    )


def _comparison_table(comparison: "Comparison") -> dg.MetadataValue:
    return markdown_table(
        ("metric", "champion", "challenger", "gain (95 % interval)"),
        [(name, str(g.champion), str(g.challenger), str(g.gain)) for name, g in comparison.gains.items()],
    )


def _compare(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: TableStore,
    registry: ModelRegistry,
    champion: ModelVersionInfo,
) -> "Comparison":
    import numpy as np

    from clinical_orchestration.modeling.compare import compare, newer_rows
    from clinical_orchestration.modeling.evaluate import EvaluationError

    labels, challenger, subjects, rows = _held_out(context, pipeline, tables, registry)
    if not labels:
        raise EvaluationError("no subject is held out yet")
    prepared = result_of(context, asset_key(RETRAINING_SET), pipeline.profile().name)
    side = _champion_side(tables, registry, pipeline.profile(), champion, rows, prepared["holdout_share"])
    context.log.info("The champion's side: %s", side.basis)
    newer = newer_rows(rows["feature_time"].to_list(), side.trained_until, labels, subjects)
    chosen = np.ones(len(labels), dtype=bool) if newer is None else newer
    since = None if newer is None else side.trained_until
    context.log.info(
        "Compared on %d of %d rows of the held-out subjects%s",
        chosen.sum(), len(labels), "" if since is None else f": those after {since:%Y-%m-%d %H:%M} UTC, which are new",
    )  # fmt: skip
    return compare(
        np.asarray(labels)[chosen],
        side.probabilities[chosen],
        challenger[chosen],
        np.asarray(subjects)[chosen],
        champion_saw_subjects=side.saw_subjects,
        basis=side.basis,
        since=since,
        seed=SEED,
    )


@dataclass(frozen=True)
class _ChampionSide:
    """The champion's probabilities for held-out rows.

    Attributes:
        saw_subjects: whether what answered was trained on these subjects.
        basis: in words, what answered.
        trained_until: time of the champion's newest training row; None where its training set cannot be read.
    """

    probabilities: "Floats"
    saw_subjects: bool
    basis: str
    trained_until: datetime | None


def _champion_side(
    tables: TableStore,
    registry: ModelRegistry,
    profile: TrialProfile,
    champion: ModelVersionInfo,
    held_out: "pl.DataFrame",
    share: float,
) -> _ChampionSide:
    """Let the champion answer the held-out rows.

    The champion in use was fitted on all subjects of its time, the held-out ones among them: asked directly it would
    recite them. So its recipe (candidate, hyper-parameters, features, seed) is fitted again on its own training set
    without the held-out subjects, as the challenger's is on today's. Where that training set is gone, the champion
    itself answers: that favours it, so that a challenger can be kept back wrongly but never promoted wrongly.
    """
    import json

    from clinical_orchestration.modeling.train import (
        TrainingData,
        TrainingDataError,
        fit_final,
        parse_hyper_parameters,
    )

    try:
        if champion.training_set_version is None:
            raise LookupError("the champion names no training set")
        params = registry.run_params(champion.run_id)
        names = tuple(json.loads(registry.read_file(champion.run_id, "features.json")))
        rows = read_training_set(tables, profile.name, champion.training_set_version)
        training = _split(rows, profile.name, share)[0]
        fitted = fit_final(
            TrainingData.from_frame(training, names),
            name=champion.candidate,
            seed=_whole(params.get("seed")) or SEED,
            parameters=parse_hyper_parameters(params),
        )
    except (LookupError, ModelNotFoundError, TrainingDataError, ValueError) as error:
        model = registry.load_model(champion.name, champion.version)
        basis = (
            f"version {champion.version} as it serves; it was trained on these subjects too, which favours it "
            f"(its own training set cannot be used: {error})"
        )
        return _ChampionSide(model.probabilities(_matrix(held_out, model.feature_names)), True, basis, None)
    basis = (
        f"the recipe of version {champion.version} ({champion.candidate}), fitted on its own training set without the "
        f"held-out subjects ({fitted.rows:,} rows of {fitted.subjects} subjects)"
    )
    newest = rows["feature_time"].max()
    until = newest if isinstance(newest, datetime) else None
    return _ChampionSide(fitted.probabilities(_matrix(held_out, fitted.feature_names)), False, basis, until)


# ---------------------------------------------------------------------------------------------- deployment, rollback


@step(
    specs=[
        spec(
            DEPLOYMENT,
            "The challenger as a registered version: champion, challenger or refused, as the promotion rule says. "
            "A champion that is replaced stays at hand as `previous_champion`.",
            group=GROUP,
            kinds={"mlflow", "fastapi"},
            deps=[COMPARISON],
        )
    ],
    pool="model_serving",
)
def deploy_new_model(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    registry: dg.ResourceParam[ModelRegistry],
    serving: dg.ResourceParam[ServingClient],
    alerts: dg.ResourceParam[Notifier],
) -> dg.MaterializeResult[Any]:
    """Register the challenger and do what was decided."""
    from clinical_orchestration.modeling.promotion import Decision

    profile = pipeline.profile()
    name = profile.model_name
    trained = result_of(context, asset_key(CHALLENGER), profile.name)
    compared = result_of(context, asset_key(COMPARISON), profile.name)
    decision = Decision.from_dict(compared["decision"])
    evaluation = stored_evaluation(registry, trained["run_id"])
    if evaluation is None:
        raise dg.Failure(f"MLflow run {trained['run_id']} has no evaluation", allow_retries=False)
    champion = registry.champion(name)
    info = registry.register(
        name,
        trained["run_id"],
        evaluation,
        description=f"{trained['candidate']} for {profile.title}, retrained; target {profile.target.name}",
        tags={TRAINING_ROWS_TAG: str(trained["rows"]), "pipeline": "scheduled_retraining"},
    )
    reasons = list(decision.reasons)
    replaced = None
    if champion is not None and champion.version == info.version:
        outcome, reasons = "unchanged", [f"version {info.version} is the champion already"]
    elif info.rolled_back:
        outcome, reasons = "refused", [f"version {info.version} was rolled back and is not promoted again"]
    else:
        registry.record_decision(name, info.version, decision)
        moved = (None if champion is None else champion.version) != compared["champion"]
        if decision.promote and not moved:
            replaced = registry.promote(name, info.version)
            outcome = "promoted"
        elif decision.promote or decision.challenger:
            registry.set_challenger(name, info.version)
            outcome = "challenger"
            if moved:
                reasons = ["another champion took over during the comparison; the next retraining compares with it"]
        else:
            registry.set_version_tags(name, info.version, {PROMOTION_TAG: "refused"})
            outcome = "refused"
    now = registry.champion(name)
    served, details = answers_with(serving, profile.name, now.version) if outcome == "promoted" and now else (None, {})
    _tell(alerts, profile, info, outcome, reasons, replaced)
    context.log.info("%s version %s: %s (%s)", name, info.version, outcome, "; ".join(reasons))
    return materialized(
        asset_key(DEPLOYMENT),
        profile.name,
        {
            "model_name": name,
            "version": info.version,
            "outcome": outcome,
            "reasons": reasons,
            "champion": None if now is None else now.version,
            "replaced": replaced,
            "served": served,
        },
        {
            "outcome": outcome,
            "reasons": "; ".join(reasons),
            "version": info.version,
            "champion_version": "none" if now is None else now.version,
            **({} if served is None else {"served": served, **details}),
            "registry": dg.MetadataValue.url(f"{registry.tracking_uri}/#/models/{name}/versions/{info.version}"),
        },
    )


def _tell(
    alerts: Notifier, profile: TrialProfile, info: ModelVersionInfo, outcome: str, reasons: list[str],
    replaced: str | None,
) -> None:  # fmt: skip
    if outcome == "unchanged":
        return
    texts = {
        "promoted": (
            Severity.INFO,
            f"is the champion{f', instead of version {replaced}' if replaced else ''}",
            "Nothing to do: it is watched, and rolled back by itself when it fails.",
        ),
        "challenger": (
            Severity.INFO,
            "waits as challenger",
            "Nothing to do; promote it by hand only with a reason that the comparison does not know.",
        ),
        "refused": (
            Severity.WARNING,
            "is refused",
            "Look at the checks of the comparison; the champion goes on serving.",
        ),
    }
    severity, what, action = texts[outcome]
    alerts.send(
        Alert(
            key=f"retraining:{profile.name}:{info.version}:{outcome}",
            severity=severity,
            title=f"Retraining: version {info.version} of {info.name} {what}",
            what="; ".join(reasons),
            where="/dagster/assets/retraining/comparison",
            action=action,
            source=DEPLOYMENT,
            trial=profile.name,
            details={"version": info.version, "outcome": outcome, "replaced": replaced},
        )
    )
    if outcome == "promoted":
        alerts.resolve(rollback_key(profile.name), f"version {info.version} was promoted")


@step(
    specs=[
        spec(
            OUTCOME,
            "What became of the retraining: the champion after it was watched for errors, latency and error on "
            "outcomes. A champion out of bounds is rolled back to the one before, here and later.",
            group=GROUP,
            kinds={"mlflow", "prometheus"},
            deps=[DEPLOYMENT],
        )
    ],
    pool="model_serving",
)
def rollback_if_needed(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
    serving: dg.ResourceParam[ServingClient],
    alerts: dg.ResourceParam[Notifier],
) -> dg.MaterializeResult[Any]:
    """Watch the champion for a while; the sensor champion_watch_sensor goes on with it."""
    profile, variables = pipeline.profile(), pipeline.variables()
    deployed = result_of(context, asset_key(DEPLOYMENT), profile.name)
    promoted = deployed["outcome"] == "promoted"
    earlier = None
    try:
        earlier = serving.sample(profile.name)
    except ServingUnavailableError as error:
        context.log.warning("%s; the champion is watched later", error)
    if promoted and earlier is not None:
        time.sleep(variables.rollback_watch_seconds)
    watched = watch_champion(
        profile,
        registry=registry,
        serving=serving,
        tables=tables,
        alerts=alerts,
        bounds=bounds_of(variables),
        performance=newest_result(context.instance, asset_key(PERFORMANCE), profile.name),
        # a new champion is judged by what it does now; one that serves longer by all that is known of it
        earlier=earlier if promoted else None,
        always_ask=True,
    )
    context.log.info("The champion %s: %s %s", watched.version, watched.state, "; ".join(watched.reasons))
    return outcome_materialization(profile.name, watched, deployed)


def outcome_materialization(
    trial: str, watched: Watched, deployed: dict[str, Any] | None = None
) -> dg.MaterializeResult[Any]:
    """Return what a look at the champion leaves for people and later steps.

    Args:
        trial: name of the profile.
        watched: what was found and done.
        deployed: result of deploy_new_model, where a retraining went before.
    """
    from clinical_orchestration.modeling.watch import watch_table

    outcome = "rolled back" if watched.state == "rolled back" else (deployed or {}).get("outcome", "watched")
    reasons = list(watched.reasons) or list((deployed or {}).get("reasons", ()))
    result = {
        **watched.to_dict(),
        "outcome": outcome,
        "reasons": reasons,
        "new_version": (deployed or {}).get("version"),
    }
    metadata: dict[str, Any] = {
        "outcome": outcome,
        "state": watched.state,
        "champion_version": watched.now or "none",
        "reasons": "; ".join(reasons) or "none",
    }
    if watched.checks:
        metadata["checks"] = markdown_table(("what", "value", "bound", "result"), watch_table(watched.checks))
    if watched.note:
        metadata["note"] = watched.note
    return materialized(asset_key(OUTCOME), trial, result, metadata)
