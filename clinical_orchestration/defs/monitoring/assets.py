"""Outcomes, performance, drift of data and concept, feature distributions, report and alerts of the champion."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.defs.common import asset_key, markdown_table, spec, step
from clinical_orchestration.defs.deployment.assets import CHAMPION
from clinical_orchestration.defs.results import materialized, result_of
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import Objects
from clinical_orchestration.stores.registry import ModelRegistry, ModelVersionInfo
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration.tables import DATA_DRIFT as DATA_DRIFT_TABLE
from clinical_orchestration.tables import FEATURES, MODEL_PERFORMANCE, PREDICTION_OUTCOMES
from clinical_orchestration.trials import TrialProfile

if TYPE_CHECKING:
    import polars as pl

    from clinical_orchestration.defs.monitoring.data import Populations
    from clinical_orchestration.monitoring.concept import ConceptDrift
    from clinical_orchestration.monitoring.distribution import FeatureDistribution
    from clinical_orchestration.monitoring.drift import DataDrift, Sample
    from clinical_orchestration.monitoring.performance import Performance

GROUP = "monitoring"
SEED = 20250101
HISTORY = timedelta(days=14)
PERFORMANCE = "monitoring/performance"
DATA_DRIFT = "monitoring/data_drift"
CONCEPT_DRIFT = "monitoring/concept_drift"
FEATURE_DISTRIBUTION = "monitoring/feature_distribution"
REPORT = "monitoring/report"
ALERTS = "monitoring/alerts"

NO_CHAMPION = "there is no champion yet; run clinical_data_pipeline until a version passes the promotion rule"
FEW_OUTCOMES = (
    "ask the model server for predictions of the trial's patients, and run this again when the horizon has passed"
)
FEW_ROWS = "run clinical_data_pipeline, so that there are current feature rows of at least {0} subjects"

ONE_OUTCOME = dg.AssetCheckSpec(
    "at_most_one_outcome_a_prediction",
    asset=asset_key(PREDICTION_OUTCOMES),
    description="No prediction id has two outcomes.",
)
NOT_DEGRADED = dg.AssetCheckSpec(
    "performance_as_at_training",
    asset=asset_key(PERFORMANCE),
    description="AUROC is not lower than at training beyond its interval, and the calibration has not shifted.",
)
ABOVE_THRESHOLD = dg.AssetCheckSpec(
    "performance_at_threshold",
    asset=asset_key(PERFORMANCE),
    description="AUROC is at least the share of its value at training that model_performance_threshold says.",
)
STABLE = dg.AssetCheckSpec(
    "features_as_at_training",
    asset=asset_key(DATA_DRIFT),
    description="No feature differs significantly, and by a population stability index above 0.2, from the training "
    "set.",
)
STEADY = dg.AssetCheckSpec(
    "errors_do_not_grow",
    asset=asset_key(CONCEPT_DRIFT),
    description="Neither detector sees the model's excess log-loss rise, and performance has not dropped.",
)
IN_RANGE = dg.AssetCheckSpec(
    "features_in_range",
    asset=asset_key(FEATURE_DISTRIBUTION),
    description="Features have plausible values, no more gaps than the training set, and are not stuck at one value.",
)
ENOUGH = dg.AssetCheckSpec(
    "enough_features",
    asset=asset_key(FEATURE_DISTRIBUTION),
    description="At least feature_count_threshold features have values, all of the model's features among them.",
)


@step(
    specs=[
        spec(
            PREDICTION_OUTCOMES,
            "What followed each prediction, once its horizon has passed and was observed: written once a prediction.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[FEATURES, CHAMPION],
        ),
        spec(
            PERFORMANCE,
            "How the champion does on its own predictions: AUROC, AUPRC, Brier score and calibration with 95 % "
            "intervals over subjects, by window, site, sex and arm, against its evaluation at training. The time "
            f"series is the table `{MODEL_PERFORMANCE}`.",
            group=GROUP,
            kinds={"deltalake", "scikitlearn", "mlflow"},
            deps=[FEATURES, CHAMPION],
        ),
    ],
    check_specs=[ONE_OUTCOME, NOT_DEGRADED, ABOVE_THRESHOLD],
    pool="monitoring_tasks",
)
def check_model_performance(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Record the outcomes that have become known, and evaluate the champion on its own."""
    from dataclasses import asdict

    from clinical_orchestration.defs.monitoring.data import baseline_of, outcomes_of, read_truth, record_outcomes
    from clinical_orchestration.monitoring.performance import Performance, assess, table_rows

    profile = pipeline.profile()
    champion = registry.champion(profile.model_name)
    truth = read_truth(tables, profile)
    counts = record_outcomes(tables, profile, truth)
    every = _column(tables, PREDICTION_OUTCOMES, profile, "prediction_id")
    yield materialized(
        asset_key(PREDICTION_OUTCOMES),
        profile.name,
        {**asdict(counts), "rows": len(every), "as_of": truth.now.isoformat()},
        {
            "dagster/row_count": len(every),
            "uri": tables.uri(PREDICTION_OUTCOMES),
            "delta_version": tables.version(PREDICTION_OUTCOMES),
            "new_outcomes": counts.determined,
            "predictions": markdown_table(
                ["predictions without an outcome before", "count"],
                [
                    ("have one now", counts.determined),
                    ("of those, with the event", counts.events),
                    ("their horizon has not passed", counts.waiting),
                    ("observation ended before their horizon", counts.censored),
                    ("before the first dose or after death", counts.out_of_scope),
                    ("no patient, or an unknown one", counts.unknown_patient),
                ],
            ),
        },
        [
            dg.AssetCheckResult(
                asset_key=asset_key(PREDICTION_OUTCOMES),
                check_name=ONE_OUTCOME.name,
                passed=len(set(every)) == len(every),
            )
        ],
    )
    if champion is None:
        performance = Performance("insufficient_data", None, (), None, None, None, (NO_CHAMPION,))
    else:
        baseline = baseline_of(registry, champion)
        performance = assess(outcomes_of(tables, profile, champion, truth), profile, baseline, seed=SEED)
        _write(
            tables,
            MODEL_PERFORMANCE,
            table_rows(performance, _common(context, profile, champion, truth.now, truth.wall)),
            context,
            profile,
        )
    context.log.info("Performance: %s. %s", performance.status, "; ".join(performance.reasons))
    insufficient = performance.status == "insufficient_data"
    result = {
        **performance.result(),
        "model_name": profile.model_name,
        "model_version": None if champion is None else champion.version,
        "as_of": truth.now.isoformat(),
        **({"what_to_do": NO_CHAMPION if champion is None else FEW_OUTCOMES} if insufficient else {}),
    }
    yield materialized(
        asset_key(PERFORMANCE),
        profile.name,
        result,
        {
            **_performance_metadata(performance),
            "status": performance.status,
            "model_version": "none" if champion is None else champion.version,
            "uri": tables.uri(MODEL_PERFORMANCE),
            **({"what_to_do": result["what_to_do"]} if insufficient else {}),
        },
        [
            dg.AssetCheckResult(
                asset_key=asset_key(PERFORMANCE),
                check_name=NOT_DEGRADED.name,
                passed=performance.status != "degraded",
                severity=dg.AssetCheckSeverity.ERROR,
                metadata={"status": performance.status, "reasons": "; ".join(performance.reasons)},
            ),
            _above_threshold(result, pipeline.variables().model_performance_threshold),
        ],
    )


def _above_threshold(result: dict[str, Any], share: float) -> dg.AssetCheckResult:
    """Compare AUROC with a share of its value at training; what is not known yet passes."""
    now, then = (result.get("auroc") or {}).get("value"), (result.get("baseline") or {}).get("auroc")
    bound = None if then is None else share * then
    return dg.AssetCheckResult(
        asset_key=asset_key(PERFORMANCE),
        check_name=ABOVE_THRESHOLD.name,
        passed=now is None or bound is None or now >= bound,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "model_performance_threshold": share,
            **({} if now is None else {"auroc": now}),
            **({} if bound is None else {"lowest_auroc": bound}),
        },
    )


def _performance_metadata(performance: "Performance") -> dict[str, Any]:
    from clinical_orchestration.modeling import plots

    evaluation = performance.current.evaluation if performance.current else None
    found: dict[str, Any] = {"reasons": "; ".join(performance.reasons)}
    if performance.windows:
        found["windows"] = markdown_table(
            ["span", "after", "up to", "outcomes", "events", "AUROC", "note"],
            [
                (
                    window.span,
                    f"{window.start:%Y-%m-%d %H:%M}",
                    f"{window.end:%Y-%m-%d %H:%M}",
                    window.rows,
                    window.events,
                    str(window.evaluation.auroc) if window.evaluation else "",
                    window.note,
                )
                for window in performance.windows
            ],
        )
    if evaluation is not None:
        found["metrics"] = dg.MetadataValue.md(plots.evaluation_table(evaluation))
        found["groups"] = dg.MetadataValue.md(plots.groups_table(evaluation))
    return found


@step(
    specs=[
        spec(
            DATA_DRIFT,
            "Whether current feature rows, and those the champion was asked about, come from the population it was "
            "trained on: Kolmogorov-Smirnov, chi-square, PSI and Jensen-Shannon with one row a subject, and control "
            f"of false discoveries over all features. The time series is the table `{DATA_DRIFT_TABLE}`.",
            group=GROUP,
            kinds={"deltalake", "polars"},
            deps=[FEATURES, CHAMPION],
        )
    ],
    check_specs=[STABLE],
    pool="monitoring_tasks",
)
def detect_data_drift(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Compare the current features with the training set of the champion's version."""
    from clinical_orchestration.defs.monitoring.data import read_truth

    profile = pipeline.profile()
    champion = registry.champion(profile.model_name)
    truth = read_truth(tables, profile)
    populations = _populations(tables, profile, champion, truth)
    found = _compare(populations)
    if champion is not None:
        common = _common(context, profile, champion, truth.now, truth.wall)
        rows = [row for source, drift in found.items() for row in _drift_rows(drift, {**common, "source": source})]
        _write(tables, DATA_DRIFT_TABLE, rows, context, profile)
    result = _drift_result(found, populations, champion)
    context.log.info("Data drift: %s.", result["status"])
    yield materialized(
        asset_key(DATA_DRIFT),
        profile.name,
        {**result, "as_of": truth.now.isoformat()},
        {
            "status": result["status"],
            "model_version": "none" if champion is None else champion.version,
            "uri": tables.uri(DATA_DRIFT_TABLE),
            "compared": populations.features_are or "nothing",
            **({"what_to_do": result["what_to_do"]} if "what_to_do" in result else {}),
            **{f"largest_in_{source}": _drift_table(drift) for source, drift in found.items()},
        },
        [
            dg.AssetCheckResult(
                check_name=STABLE.name,
                passed=result["status"] != "drift",
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"status": result["status"], "drifted": ", ".join(result["drifted_features"][:20])},
            )
        ],
    )


def _populations(
    tables: TableStore, profile: TrialProfile, champion: ModelVersionInfo | None, truth: Any
) -> "Populations":
    from clinical_orchestration.defs.monitoring.data import Populations, read_populations

    if champion is None:
        return Populations(None, why=NO_CHAMPION)
    return read_populations(tables, profile, champion, truth)


def _compare(populations: "Populations") -> "dict[str, DataDrift]":
    """Return the comparison of each source that has enough subjects; the sources share the rate of false alarms."""
    from clinical_orchestration.monitoring.drift import ALPHA, MIN_SUBJECTS, compare

    reference = populations.reference
    if reference is None or reference.subject_count < MIN_SUBJECTS:
        return {}
    sources = {
        source: sample
        for source, sample in (("features", populations.features), ("predictions", populations.predictions))
        if sample is not None and sample.subject_count >= MIN_SUBJECTS
    }
    return {
        source: compare(reference, sample, seed=SEED, alpha=ALPHA / len(sources)) for source, sample in sources.items()
    }


def _drift_result(
    found: "Mapping[str, DataDrift]", populations: "Populations", champion: ModelVersionInfo | None
) -> dict[str, Any]:
    from clinical_orchestration.monitoring.drift import MIN_SUBJECTS

    drifted = list(dict.fromkeys(name for drift in found.values() for name in drift.drifted))
    main = found.get("features") or next(iter(found.values()), None)
    features = len(main.features) if main else 0
    result: dict[str, Any] = {
        "status": "insufficient_data" if main is None else "drift" if drifted else "stable",
        "drifted_features": drifted,
        "share_drifted": len(drifted) / features if features else 0.0,
        "max_psi": max((drift.max_psi for drift in found.values()), default=0.0),
        "features": features,
        "reference_rows": main.reference_rows if main else 0,
        "current_rows": main.current_rows if main else 0,
        "model_version": None if champion is None else champion.version,
        "compared": populations.features_are,
        "sources": {
            source: {
                "drifted_features": list(drift.drifted),
                "max_psi": drift.max_psi,
                "reference_rows": drift.reference_rows,
                "current_rows": drift.current_rows,
                "ageing_features": sum(item.ageing for item in drift.features),
            }
            for source, drift in found.items()
        },
    }
    if main is None:
        result["what_to_do"] = populations.why or FEW_ROWS.format(MIN_SUBJECTS)
    return result


def _drift_rows(drift: "DataDrift", common: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **common,
            "feature": item.name,
            **{
                name: getattr(item, name)
                for name in (
                    "test", "statistic", "p_value", "q_value", "psi", "jensen_shannon", "missing_reference",
                    "missing_current", "mean_reference", "mean_current", "ageing", "drifted",
                )
            },
            "reference_rows": drift.reference_rows,
            "current_rows": drift.current_rows,
        }
        for item in drift.features
    ]  # fmt: skip


def _drift_table(drift: "DataDrift", top: int = 15) -> dg.MetadataValue:
    return markdown_table(*_drift_cells(drift, top))


def _drift_cells(drift: "DataDrift", top: int) -> tuple[Sequence[str], list[Sequence[Any]]]:
    columns = ("feature", "PSI", "Jensen-Shannon", "test", "q", "mean then", "mean now", "missing then",
               "missing now", "drifted")  # fmt: skip
    largest = sorted(drift.features, key=lambda item: (not item.drifted, -item.psi, item.name))[:top]
    return columns, [
        (
            item.name, item.psi, item.jensen_shannon, item.test, item.q_value, item.mean_reference, item.mean_current,
            item.missing_reference, item.missing_current, "ageing" if item.ageing else item.drifted,
        )
        for item in largest
    ]  # fmt: skip


@step(
    specs=[
        spec(
            CONCEPT_DRIFT,
            "Whether outcomes still follow from the features as they did: ADWIN and Page-Hinkley on the champion's "
            "excess log-loss in time order, and a drop of its performance beyond the interval.",
            group=GROUP,
            kinds={"python", "mlflow"},
            deps=[FEATURES, CHAMPION],
        )
    ],
    check_specs=[STEADY],
    pool="monitoring_tasks",
)
def check_concept_drift(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Watch the champion's errors in time order."""
    from clinical_orchestration.defs.monitoring.data import baseline_of, outcomes_of, read_truth
    from clinical_orchestration.monitoring.concept import ConceptDrift, detect
    from clinical_orchestration.monitoring.performance import assess, one_a_feature_row

    profile = pipeline.profile()
    champion = registry.champion(profile.model_name)
    if champion is None:
        drift, detectors = ConceptDrift("insufficient_data", {}, [], NO_CHAMPION), {}
        status, advice = drift.status, NO_CHAMPION
    else:
        outcomes = outcomes_of(tables, profile, champion, read_truth(tables, profile))
        drift = detect(one_a_feature_row(outcomes), seed=SEED)
        performance = assess(outcomes, profile, baseline_of(registry, champion), seed=SEED, replicates=500)
        detectors = {name: item.as_dict(drift.times) for name, item in drift.detectors.items()}
        if performance.status != "insufficient_data":
            detectors["performance"] = {
                "drift": performance.status == "degraded",
                "detected_at": None,
                "drop": performance.drop,
                "reasons": list(performance.reasons),
            }
        status, advice = _concept_status(drift, detectors), FEW_OUTCOMES
    context.log.info("Concept drift: %s. %s", status, drift.note)
    at = drift.detected_at
    insufficient = status == "insufficient_data"
    yield materialized(
        asset_key(CONCEPT_DRIFT),
        profile.name,
        {
            "status": status,
            "detectors": detectors,
            "detected_at": None if at is None else at.isoformat(),
            "model_version": None if champion is None else champion.version,
            "outcomes": len(drift.times),
            "note": drift.note,
            **({"what_to_do": advice} if insufficient else {}),
        },
        {
            "status": status,
            "model_version": "none" if champion is None else champion.version,
            "detectors": markdown_table(
                ["detector", "drift", "detected at", "bound or drop"],
                [
                    (name, item["drift"], item["detected_at"], item.get("bound", item.get("drop")))
                    for name, item in detectors.items()
                ],
            ),
            **({"what_to_do": advice, "missing": drift.note} if insufficient else {}),
        },
        [
            dg.AssetCheckResult(
                check_name=STEADY.name,
                passed=status != "drift",
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"status": status},
            )
        ],
    )


def _concept_status(drift: "ConceptDrift", detectors: Mapping[str, Mapping[str, Any]]) -> str:
    if any(item["drift"] for item in detectors.values()):
        return "drift"
    return drift.status


@step(
    specs=[
        spec(
            FEATURE_DISTRIBUTION,
            "Whether current feature rows are sound: values in range, no more gaps than at training, nothing stuck "
            "at one value, and as many features as the platform asks for.",
            group=GROUP,
            kinds={"polars"},
            deps=[PERFORMANCE, DATA_DRIFT, CONCEPT_DRIFT],
        )
    ],
    check_specs=[IN_RANGE, ENOUGH],
    pool="monitoring_tasks",
)
def validate_feature_distribution(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
) -> Iterator[dg.MaterializeResult[Any]]:
    """Check ranges, gaps and constants of the current rows, and count the features."""
    from clinical_orchestration.defs.monitoring.data import read_truth
    from clinical_orchestration.monitoring.distribution import check_distribution, result

    profile = pipeline.profile()
    champion = registry.champion(profile.model_name)
    populations = _populations(tables, profile, champion, read_truth(tables, profile))
    if populations.reference is None or populations.features is None:
        advice = populations.why or FEW_ROWS.format(1)
        found: dict[str, Any] = {"status": "insufficient_data", "failing": {}, "absent": [], "what_to_do": advice}
        distribution: FeatureDistribution | None = None
    else:
        threshold = pipeline.variables().feature_count_threshold
        distribution = check_distribution(populations.reference, populations.features, profile, threshold, seed=SEED)
        found = result(distribution)
    context.log.info("Feature distribution: %s.", found["status"])
    passed = distribution is None or not distribution.failing
    enough = distribution is None or (distribution.enough_features and not distribution.absent)
    yield materialized(
        asset_key(FEATURE_DISTRIBUTION),
        profile.name,
        found,
        {
            "status": found["status"],
            **({"what_to_do": found["what_to_do"]} if distribution is None else {}),
            **({} if distribution is None else _distribution_metadata(distribution)),
        },
        [
            dg.AssetCheckResult(
                check_name=IN_RANGE.name,
                passed=passed,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"failing": ", ".join(list(found["failing"])[:20]), "status": found["status"]},
            ),
            dg.AssetCheckResult(
                check_name=ENOUGH.name,
                passed=enough,
                severity=dg.AssetCheckSeverity.ERROR,
                metadata={"absent": ", ".join(found["absent"][:20]), "status": found["status"]},
            ),
        ],
    )


def _distribution_metadata(distribution: "FeatureDistribution") -> dict[str, Any]:
    return {
        "rows": distribution.rows,
        "features_with_values": distribution.feature_count,
        "feature_count_threshold": distribution.feature_count_threshold,
        "problems": markdown_table(
            ["feature", "low", "high", "outside", "missing", "missing at training", "problem"],
            [
                (item.name, item.low, item.high, item.outside, item.missing, item.missing_reference,
                 "; ".join(item.problems))
                for item in distribution.failing[:40]
            ],
        ),
    }  # fmt: skip


@step(
    specs=[
        spec(
            REPORT,
            "The run's findings as a page with plots over time, and Evidently's drift report, both in the bucket.",
            group=GROUP,
            kinds={"html", "minio"},
            deps=[FEATURE_DISTRIBUTION],
        )
    ],
    pool="monitoring_tasks",
)
def generate_monitoring_report(
    context: dg.AssetExecutionContext,
    pipeline: PipelineResource,
    tables: dg.ResourceParam[TableStore],
    registry: dg.ResourceParam[ModelRegistry],
    objects: dg.ResourceParam[Objects],
) -> dg.MaterializeResult[Any]:
    """Write the reports and link them."""
    from clinical_orchestration.defs.monitoring.data import read_truth
    from clinical_orchestration.monitoring.drift import PSI_BOUND
    from clinical_orchestration.monitoring.plots import drift_plot, history_plot, performance_plot
    from clinical_orchestration.monitoring.report import page

    profile = pipeline.profile()
    champion = registry.champion(profile.model_name)
    truth = read_truth(tables, profile)
    results = {name: result_of(context, asset_key(name), profile.name) for name in _STATUSES}
    findings = {
        title: (str(results[name].get("status")), _sentence(name, results[name])) for name, title in _STATUSES.items()
    }
    this_run = _of_run(tables, DATA_DRIFT_TABLE, context, profile).sort("psi", descending=True).to_dicts()
    windows = [
        row
        for row in _of_run(tables, MODEL_PERFORMANCE, context, profile).sort("window_end").to_dicts()
        if row["span"] == "window" and row["attribute"] == "all"
    ]
    baseline = (results[PERFORMANCE].get("baseline") or {}).get("auroc")
    plots = {
        "Performance over time": performance_plot(windows, baseline),
        "Features against the training set": drift_plot(
            [
                (row["feature"], row["psi"], row["drifted"])
                for row in this_run
                if row["source"] == "features" and not row["ageing"]
            ],
            PSI_BOUND,
        ),
        "Drift over time": history_plot(_runs(tables, profile, truth.wall), PSI_BOUND),
    }
    folder = f"reports/monitoring/{profile.name}"
    stamp = f"{truth.wall:%Y-%m-%dT%H%M%SZ}"
    links: dict[str, str] = {}
    if champion is not None:
        populations = _populations(tables, profile, champion, truth)
        order = list(dict.fromkeys(row["feature"] for row in sorted(this_run, key=lambda r: not r["drifted"])))
        html = _evidently(context, populations, order)
        if html is not None:
            # megabytes each: the newest of a day is kept
            links["Evidently"] = objects.put(f"{folder}/evidently-{truth.wall:%Y-%m-%d}.html", html, "text/html")
    content = page(
        f"Model monitoring of {profile.title}",
        truth.now,
        findings,
        plots,
        {
            "Features that have drifted": (
                ("feature", "rows of", "PSI", "Jensen-Shannon", "mean at training", "mean now"),
                [
                    (row["feature"], row["source"], row["psi"], row["jensen_shannon"], row["mean_reference"],
                     row["mean_current"])
                    for row in this_run
                    if row["drifted"]
                ],
            ),
            "Features out of range": (
                ("feature", "problem"),
                [(name, "; ".join(why)) for name, why in results[FEATURE_DISTRIBUTION].get("failing", {}).items()],
            ),
        },
        links,
    )  # fmt: skip
    links["report"] = objects.put(f"{folder}/{stamp}.html", content, "text/html")
    for name, png in plots.items():
        if png is not None:
            links[name] = objects.put(f"{folder}/{stamp}-{name.lower().replace(' ', '-')}.png", png, "image/png")
    shown = plots["Performance over time"] or plots["Features against the training set"]
    return materialized(
        asset_key(REPORT),
        profile.name,
        {
            "report": links["report"],
            "evidently": links.get("Evidently"),
            "plots": len([p for p in plots.values() if p]),
        },
        {
            **{name.lower().replace(" ", "_"): dg.MetadataValue.path(uri) for name, uri in links.items()},
            "statuses": markdown_table(
                ["check", "status", "finding"],
                [
                    (title, results[name].get("status"), _sentence(name, results[name]))
                    for name, title in _STATUSES.items()
                ],
            ),
            **({"plot": _inline(shown)} if shown else {}),
        },
    )


_STATUSES = {
    PERFORMANCE: "Performance",
    DATA_DRIFT: "Data drift",
    CONCEPT_DRIFT: "Concept drift",
    FEATURE_DISTRIBUTION: "Feature distribution",
}


def _evidently(context: dg.AssetExecutionContext, populations: "Populations", order: Sequence[str]) -> bytes | None:
    """Return Evidently's report; None, and a line in the log, where it cannot be made: the run needs it not."""
    from clinical_orchestration.monitoring.drift import PSI_BOUND
    from clinical_orchestration.monitoring.report import evidently_report

    reference, current = populations.reference, populations.features
    if reference is None or current is None or not order:
        return None
    try:
        return evidently_report(*_one_each(reference, current), order, bound=PSI_BOUND, seed=SEED).encode()
    except Exception as error:
        context.log.warning("Evidently made no report: %s", type(error).__name__, exc_info=True)
        return None


def _one_each(reference: "Sample", current: "Sample") -> "tuple[Sample, Sample]":
    """Return one row a subject of both, as drift detection compares them."""
    import numpy as np

    from clinical_orchestration.monitoring.drift import one_row_a_subject, resembling

    rng = np.random.default_rng(SEED)
    now = current.take(one_row_a_subject(current, rng))
    return resembling(reference, now, rng)[0], now


def _of_run(tables: TableStore, name: str, context: dg.AssetExecutionContext, profile: TrialProfile) -> "pl.DataFrame":
    """Return this run's rows of a time series."""
    import polars as pl

    mine = [("trial", "=", profile.name), ("run_id", "=", context.run.run_id)]
    return pl.DataFrame(pl.from_arrow(tables.read(name, filters=mine)))


def _runs(tables: TableStore, profile: TrialProfile, wall: datetime) -> list[tuple[datetime, float, int]]:
    """Return the drift seen by each run of the last weeks, oldest first."""
    import polars as pl

    columns = ["run_id", "computed_at", "feature", "psi", "drifted"]
    recent = [("trial", "=", profile.name), ("computed_at", ">", wall - HISTORY)]
    by_run = (
        pl.DataFrame(pl.from_arrow(tables.read(DATA_DRIFT_TABLE, columns=columns, filters=recent)))
        .group_by("run_id")
        .agg(
            pl.col("computed_at").max(),
            pl.col("psi").filter("drifted").max().fill_null(0.0),
            pl.col("feature").filter("drifted").n_unique().alias("drifted"),
        )
        .sort("computed_at")
    )
    return [(row["computed_at"], row["psi"], row["drifted"]) for row in by_run.to_dicts()]


def _inline(png: bytes) -> dg.MetadataValue:
    import base64

    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})")


def _sentence(name: str, result: Mapping[str, Any]) -> str:
    """Return one finding in words and figures."""
    if result.get("status") == "insufficient_data":
        return f"To do: {result.get('what_to_do', FEW_OUTCOMES)}."
    if name == PERFORMANCE:
        auroc = result.get("auroc") or {}
        text = f"AUROC {_figure(auroc.get('value'))} on {result['rows']} outcomes with {result['events']} events"
        return "; ".join([text, *result.get("reasons", [])])
    if name == DATA_DRIFT:
        drifted = result["drifted_features"]
        if not drifted:
            return f"no drift in {result['features']} features, {result['current_rows']} subjects"
        more = f" and {len(drifted) - 5} more" if len(drifted) > 5 else ""
        return (
            f"{len(drifted)} of {result['features']} features, largest PSI {result['max_psi']:.2f}: "
            f"{', '.join(drifted[:5])}{more}"
        )
    if name == CONCEPT_DRIFT:
        fired = [detector for detector, item in result["detectors"].items() if item["drift"]]
        return f"seen by {', '.join(fired)}" if fired else f"errors steady over {result.get('outcomes', 0)} outcomes"
    failing, absent = result.get("failing", {}), result.get("absent", [])
    few = result["feature_count"] < result["feature_count_threshold"]
    return "; ".join(
        [f"{result['feature_count']} features with values" + (f", {result['feature_count_threshold']} asked" * few)]
        + ([f"{len(failing)} out of bounds: {', '.join(list(failing)[:5])}"] if failing else [])
        + ([f"{len(absent)} without values: {', '.join(absent[:5])}"] if absent else [])
    )


def _figure(value: float | None) -> str:
    return "not determined" if value is None else f"{value:.3f}"


@step(
    specs=[
        spec(
            ALERTS,
            "Alerts raised and resolved: degraded performance, drift of data or concept, unsound features.",
            group=GROUP,
            kinds={"python"},
            deps=[REPORT],
        )
    ],
    pool="alert_processing",
)
def send_alerts_if_needed(
    context: dg.AssetExecutionContext, pipeline: PipelineResource, alerts: dg.ResourceParam[Notifier]
) -> dg.MaterializeResult[Any]:
    """Raise an alert for each bad finding; resolve those of findings that are good again.

    A finding without enough data neither raises nor resolves anything.
    """
    profile = pipeline.profile()
    report = result_of(context, asset_key(REPORT), profile.name)
    raised, resolved, sent = [], [], 0
    for name, rule in _ALERTS.items():
        result = result_of(context, asset_key(name), profile.name)
        key = f"{rule['key']}:{profile.name}"
        status = result.get("status")
        if status == rule["bad"]:
            raised.append(key)
            sent += alerts.send(_alert(key, rule, name, result, report, profile))
        elif status != "insufficient_data" and alerts.resolve(key, f"{_STATUSES[name]}: {_sentence(name, result)}"):
            resolved.append(key)
    context.log.info("%d alerts raised, %d resolved.", len(raised), len(resolved))
    return materialized(
        asset_key(ALERTS),
        profile.name,
        {"raised": raised, "resolved": resolved, "sent": sent},
        {
            "raised": ", ".join(raised) or "none",
            "resolved": ", ".join(resolved) or "none",
            "messages_sent": sent,
            "at": dg.MetadataValue.timestamp(datetime.now(UTC)),
        },
    )


_ALERTS: dict[str, dict[str, Any]] = {
    PERFORMANCE: {
        "key": "model_performance",
        "bad": "degraded",
        "severity": Severity.ERROR,
        "title": "The served model does worse than at training",
        "action": "Look at the windows and groups of the report. If a group or a time stands out, look for its cause "
        "in the data; else start scheduled_retraining.",
    },
    DATA_DRIFT: {
        "key": "data_drift",
        "bad": "drift",
        "severity": Severity.WARNING,
        "title": "Features have drifted from the training set",
        "action": "Find out whether a device, unit, site or laboratory changed (data_quality_monitoring compares "
        "sites). Mend the source if so; if the population has changed, start scheduled_retraining.",
    },
    CONCEPT_DRIFT: {
        "key": "concept_drift",
        "bad": "drift",
        "severity": Severity.ERROR,
        "title": "Outcomes no longer follow from the features as they did",
        "action": "Compare the time of the detection with changes of the trial (dose, protocol, reporting), and start "
        "scheduled_retraining.",
    },
    FEATURE_DISTRIBUTION: {
        "key": "feature_distribution",
        "bad": "failed",
        "severity": Severity.ERROR,
        "title": "Features are out of range, stuck or missing",
        "action": "Look at the features named in the report; trace them to their silver table and its quarantine.",
    },
}


def _alert(
    key: str,
    rule: Mapping[str, Any],
    name: str,
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    profile: TrialProfile,
) -> Alert:
    what = f"{_STATUSES[name]} of {profile.name}: {_sentence(name, result)}."
    version = result.get("model_version")
    if version is not None:
        what += f" Model version {version}."
    return Alert(
        key=key,
        severity=rule["severity"],
        title=f"{rule['title']} ({profile.name})",
        what=what,
        where=f"/dagster/assets/{name}",
        action=rule["action"],
        source=name,
        trial=profile.name,
        details={"report": report.get("report"), "evidently": report.get("evidently"), "model_version": version},
    )


def _common(
    context: dg.AssetExecutionContext,
    profile: TrialProfile,
    champion: ModelVersionInfo,
    now: datetime,
    wall: datetime,
) -> dict[str, Any]:
    return {
        "trial": profile.name,
        "model_name": champion.name,
        "model_version": champion.version,
        "run_id": context.run.run_id,
        "computed_at": wall,
        "as_of": now,
    }


def _write(
    tables: TableStore,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    context: dg.AssetExecutionContext,
    profile: TrialProfile,
) -> None:
    """Write the run's rows of a time series; a step that is tried again replaces its own."""
    import pyarrow as pa

    from clinical_orchestration.stores.tables import known_schema

    schema = known_schema(name)
    if schema is None:
        raise KeyError(f"tables.py does not describe {name}")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    if context.retry_number == 0:
        tables.append(name, table)
    else:
        tables.replace(name, table, predicate=f"run_id = '{context.run.run_id}' AND trial = '{profile.name}'")
    tables.maintain(name, min_small_files=64)


def _column(tables: TableStore, name: str, profile: TrialProfile, column: str) -> list[Any]:
    found = tables.read(name, columns=[column], filters=[("trial", "=", profile.name)])
    values: list[Any] = found.column(column).to_pylist()
    return values
