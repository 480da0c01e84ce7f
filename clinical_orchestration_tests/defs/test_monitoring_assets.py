"""The steps of model_monitoring on in-memory tables, bucket, registry and notifier."""

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from clinical_orchestration.contract import MODEL_MONITORING
from clinical_orchestration.defs import monitoring
from clinical_orchestration.defs.monitoring import assets, data
from clinical_orchestration.monitoring import plots
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.tables import DeltaTableStore, TableStore
from clinical_orchestration.tables import DATA_DRIFT, MODEL_PERFORMANCE, PREDICTION_OUTCOMES
from clinical_orchestration_tests.fakes import InMemoryObjects, InMemoryTableStore, RecordingNotifier
from clinical_orchestration_tests.monitoring.trial_in_memory import (
    PROFILE,
    START,
    FakeRegistry,
    Trial,
    baseline,
    make_trial,
    prediction,
    version,
)

RESULTS = (assets.PERFORMANCE, assets.DATA_DRIFT, assets.CONCEPT_DRIFT, assets.FEATURE_DISTRIBUTION, assets.REPORT,
           assets.ALERTS)  # fmt: skip


class Run:
    """One run of the pipeline's steps, and what it left."""

    def __init__(self, tables: TableStore, registry: FakeRegistry, notifier: RecordingNotifier | None = None) -> None:
        self.tables, self.objects, self.notifier = tables, InMemoryObjects(), notifier or RecordingNotifier()
        result = dg.materialize(
            monitoring.ASSETS,
            resources={
                "pipeline": PipelineResource(trial=PROFILE.name),
                "tables": tables,
                "registry": registry,
                "objects": self.objects,
                "alerts": self.notifier,
            },
        )
        assert result.success
        self.checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
        self.results: dict[str, dict[str, Any]] = {
            event.asset_key.to_user_string(): event.materialization.metadata["result"].value  # type: ignore[union-attr]
            for event in result.get_asset_materialization_events()
        }


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Evidently and the drawing of plots out: they take seconds and have tests of their own."""
    monkeypatch.setattr(assets, "_evidently", lambda *_: None)
    monkeypatch.setattr(plots, "png", lambda *_, **__: b"\x89PNG")


@pytest.fixture(scope="module")
def sound() -> tuple[Trial, FakeRegistry]:
    trial = make_trial()
    return trial, FakeRegistry(info=version(), evaluation=baseline(trial))


@pytest.fixture(scope="module")
def sound_run(sound: tuple[Trial, FakeRegistry]) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "_evidently", lambda *_: b"<html>evidently</html>")
        return Run(sound[0].store(), sound[1])


def test_a_sound_trial_is_quiet(sound_run: Run) -> None:
    statuses = {name: sound_run.results[name]["status"] for name in RESULTS[:4]}
    assert statuses == {
        assets.PERFORMANCE: "ok", assets.DATA_DRIFT: "stable", assets.CONCEPT_DRIFT: "none",
        assets.FEATURE_DISTRIBUTION: "ok",
    }  # fmt: skip
    assert all(check.passed for check in sound_run.checks.values())
    assert sound_run.notifier.sent == []
    assert set(sound_run.notifier.resolved) == {f"{rule['key']}:{PROFILE.name}" for rule in assets._ALERTS.values()}


def test_results_have_the_keys_that_others_read(sound_run: Run) -> None:
    performance = sound_run.results[assets.PERFORMANCE]
    assert {"status", "rows", "events", "model_version", "baseline", "drop", "window_start", "window_end"} <= set(
        performance
    )
    for metric in ("auroc", "auprc", "brier", "ece"):
        assert set(performance[metric]) == {"value", "lower", "upper"}
        assert isinstance(performance["baseline"][metric], float)
    drift = sound_run.results[assets.DATA_DRIFT]
    assert {"drifted_features", "share_drifted", "max_psi", "features", "reference_rows", "current_rows"} <= set(drift)
    assert drift["compared"] == "rows newer than the training set"
    assert set(drift["sources"]) == {"features", "predictions"}
    assert sound_run.results[assets.CONCEPT_DRIFT].keys() >= {"status", "detectors", "detected_at"}
    assert set(sound_run.results[assets.CONCEPT_DRIFT]["detectors"]) == {"adwin", "page_hinkley", "performance"}


def test_time_series_hold_one_row_a_feature_and_a_segment(sound_run: Run) -> None:
    drift = pl.DataFrame(pl.from_arrow(sound_run.tables.read(DATA_DRIFT)))
    assert drift.group_by("run_id", "source", "feature").len()["len"].max() == 1
    assert set(drift["source"]) == {"features", "predictions"}
    rows = pl.DataFrame(pl.from_arrow(sound_run.tables.read(MODEL_PERFORMANCE)))
    assert set(rows["span"]) == {"window", "all", "current"}
    assert set(rows["attribute"]) == {"all", "site", "sex", "arm"}
    decided = rows.filter(pl.col("status").is_not_null() & (pl.col("attribute") == "all"))
    assert decided["status"].to_list() == ["ok"]


def test_report_is_linked_and_names_no_patient(sound_run: Run) -> None:
    uri = sound_run.results[assets.REPORT]["report"]
    html = sound_run.objects.get(uri.removeprefix("s3://memory/"))
    assert b"Performance over time" in html
    assert b"data:image/png" in html
    assert b"P00" not in re.sub(rb"base64,[^']*", b"", html)
    assert sound_run.results[assets.REPORT]["evidently"] in {
        sound_run.objects.uri(key) for key in sound_run.objects.objects
    }


def test_days_in_the_trial_raise_nothing_though_they_differ(sound_run: Run) -> None:
    rows = pl.DataFrame(pl.from_arrow(sound_run.tables.read(DATA_DRIFT)))
    days = rows.filter((pl.col("feature") == "day_in_trial") & (pl.col("source") == "features")).to_dicts()[0]
    assert days["psi"] > 0.2
    assert (days["ageing"], days["drifted"]) == (True, False)


def test_outcomes_are_written_once(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, registry = sound
    tables = trial.store()
    first, again = Run(tables, registry), Run(tables, registry)
    assert first.results[PREDICTION_OUTCOMES]["determined"] == first.results[PREDICTION_OUTCOMES]["rows"] > 0
    assert again.results[PREDICTION_OUTCOMES]["determined"] == 0
    assert again.results[PREDICTION_OUTCOMES]["rows"] == first.results[PREDICTION_OUTCOMES]["rows"]
    assert again.results[assets.PERFORMANCE]["auroc"] == first.results[assets.PERFORMANCE]["auroc"]


def test_outcomes_come_when_the_horizon_has_passed(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, _ = sound
    early = trial.grow(START + timedelta(days=5))
    tables = early.store()
    truth = data.read_truth(tables, PROFILE)
    assert truth.now == START + timedelta(days=5)
    before = data.record_outcomes(tables, PROFILE, truth)
    assert before.waiting > 0
    later = trial.store()
    for name in ("silver/patient_vitals", "silver/adverse_events"):
        tables.replace(name, later.read(name))
    after = data.record_outcomes(tables, PROFILE, data.read_truth(tables, PROFILE))
    assert after.determined == before.waiting + before.censored - after.waiting - after.censored
    ids = tables.read(PREDICTION_OUTCOMES).column("prediction_id").to_pylist()
    assert len(ids) == len(set(ids)) == before.determined + after.determined


def test_two_runs_at_once_write_no_outcome_twice(
    sound: tuple[Trial, FakeRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = sound[0].store()
    truth = data.read_truth(tables, PROFILE)
    append, raced = tables.append, []

    def overtaken(name: str, *args: Any, **kwargs: Any) -> int | None:
        if name == PREDICTION_OUTCOMES and not raced:
            raced.append(True)
            data.record_outcomes(tables, PROFILE, truth)  # the other run is faster
        return append(name, *args, **kwargs)

    monkeypatch.setattr(tables, "append", overtaken)
    data.record_outcomes(tables, PROFILE, truth)
    ids = tables.read(PREDICTION_OUTCOMES).column("prediction_id").to_pylist()
    assert len(ids) == len(set(ids)) > 0


def test_predictions_without_a_known_patient_are_counted_and_have_no_outcome(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, registry = sound
    tables = trial.store()
    trial.add_predictions(
        tables, [prediction("batch", None, START), prediction("stranger", "NOBODY", START + timedelta(days=1))]
    )
    run = Run(tables, registry)
    assert run.results[PREDICTION_OUTCOMES]["unknown_patient"] == 2
    assert not {"batch", "stranger"} & set(tables.read(PREDICTION_OUTCOMES).column("prediction_id").to_pylist())


def test_other_versions_are_kept_apart(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, registry = sound
    successor = replace(registry, info=version("2"))
    run = Run(trial.store(), successor)
    assert run.results[assets.PERFORMANCE]["status"] == "insufficient_data"
    assert run.results[assets.PERFORMANCE]["rows"] == 0
    assert run.results[PREDICTION_OUTCOMES]["determined"] > 0
    assert "predictions" not in run.results[assets.DATA_DRIFT]["sources"]


@pytest.mark.parametrize("without", ["champion", "predictions", "everything", "training set"])
def test_too_little_to_judge_succeeds_and_says_what_to_do(sound: tuple[Trial, FakeRegistry], without: str) -> None:
    trial, registry = sound
    if without == "everything":
        tables, registry = InMemoryTableStore(), FakeRegistry()
    elif without == "champion":
        tables, registry = trial.store(), FakeRegistry()
    elif without == "training set":
        tables, registry = replace(trial, predictions=[]).store(), FakeRegistry(info=version("1", 99))
    else:
        tables = replace(trial, predictions=[]).store()
    run = Run(tables, registry)
    silent = [assets.PERFORMANCE, assets.CONCEPT_DRIFT]
    silent += [] if without == "predictions" else [assets.DATA_DRIFT, assets.FEATURE_DISTRIBUTION]
    for name in silent:
        assert run.results[name]["status"] == "insufficient_data"
        assert len(run.results[name]["what_to_do"]) > 20
    assert run.notifier.sent == []
    assert not {f"model_performance:{PROFILE.name}", f"concept_drift:{PROFILE.name}"} & set(run.notifier.resolved)
    assert run.results[assets.REPORT]["report"]


def test_a_shifted_vital_sign_raises_an_alert_and_its_end_resolves_it(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, registry = sound
    late = pl.col("feature_time") > START + timedelta(days=4)
    levels = [n for n in trial.features.columns if n.startswith("temperature_") and ("mean" in n or "latest" in n)]
    hot = trial.features.with_columns(pl.when(late).then(pl.col(name) + 0.6).otherwise(pl.col(name)) for name in levels)
    notifier = RecordingNotifier()
    run = Run(replace(trial, features=hot).store(), registry, notifier)
    assert run.results[assets.DATA_DRIFT]["status"] == "drift"
    assert set(run.results[assets.DATA_DRIFT]["drifted_features"]) <= set(levels)
    assert not run.checks["features_as_at_training"].passed
    assert run.checks["features_as_at_training"].severity == dg.AssetCheckSeverity.WARN
    (alert,) = notifier.sent
    assert alert.key == f"data_drift:{PROFILE.name}"
    assert "temperature" in alert.what
    assert alert.details["report"].startswith("s3://")
    assert alert.where.startswith("/dagster/assets/")
    again = Run(trial.store(), registry, notifier)
    assert f"data_drift:{PROFILE.name}" in again.results[assets.ALERTS]["resolved"]


def test_more_events_than_the_model_expects_are_degradation_and_concept_drift() -> None:
    trial = make_trial(3, later_shift=1.6)
    run = Run(trial.store(), FakeRegistry(info=version(), evaluation=baseline(trial)))
    assert run.results[assets.PERFORMANCE]["status"] == "degraded"
    assert "underestimated" in " ".join(run.results[assets.PERFORMANCE]["reasons"])
    assert run.results[assets.CONCEPT_DRIFT]["status"] == "drift"
    detectors = run.results[assets.CONCEPT_DRIFT]["detectors"]
    assert detectors["page_hinkley"]["drift"]
    assert run.results[assets.CONCEPT_DRIFT]["detected_at"] > (START + timedelta(days=4)).isoformat()
    assert {alert.key.split(":")[0] for alert in run.notifier.sent} == {"model_performance", "concept_drift"}
    assert all("P00" not in alert.what for alert in run.notifier.sent)
    assert not run.checks["performance_as_at_training"].passed
    assert not run.checks["errors_do_not_grow"].passed


def test_broken_features_raise_an_alert(sound: tuple[Trial, FakeRegistry]) -> None:
    trial, registry = sound
    broken = trial.features.with_columns(
        heart_rate_latest=pl.when(pl.col("feature_time") > START + timedelta(days=5))
        .then(999.0)
        .otherwise(pl.col("heart_rate_latest")),
        lab_alt_latest=pl.lit(None, pl.Float64),
    )
    good = trial.store()
    tables = replace(trial, features=broken).store()
    tables.replace("gold/training_set", good.read("gold/training_set"))
    run = Run(tables, replace(registry, info=version("1", 2)))
    found = run.results[assets.FEATURE_DISTRIBUTION]
    assert "heart_rate_latest" in found["failing"]
    assert found["absent"] == ["lab_alt_latest"]
    assert not run.checks["features_in_range"].passed
    assert not run.checks["enough_features"].passed
    assert f"feature_distribution:{PROFILE.name}" in {alert.key for alert in run.notifier.sent}


def test_too_few_features_fail_their_check(sound: tuple[Trial, FakeRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_VAR_FEATURE_COUNT_THRESHOLD", "10000")
    run = Run(sound[0].store(), sound[1])
    assert run.results[assets.FEATURE_DISTRIBUTION]["status"] == "failed"
    assert not run.checks["enough_features"].passed


def test_a_failing_evidently_does_not_fail_the_run(
    sound: tuple[Trial, FakeRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise RuntimeError("no")

    monkeypatch.undo()
    monkeypatch.setattr("clinical_orchestration.monitoring.report.evidently_report", broken)
    run = Run(sound[0].store(), sound[1])
    assert run.results[assets.REPORT]["evidently"] is None
    assert run.results[assets.REPORT]["report"]


def test_runs_on_real_delta_tables(sound: tuple[Trial, FakeRegistry], sound_run: Run, tmp_path: Path) -> None:
    trial, registry = sound
    tables = DeltaTableStore(str(tmp_path))
    trial.store(tables)
    trained = replace(registry, info=version("1", tables.version("gold/training_set")))
    run, again = Run(tables, trained), Run(tables, trained)
    for name in (assets.PERFORMANCE, assets.DATA_DRIFT, assets.CONCEPT_DRIFT, assets.FEATURE_DISTRIBUTION):
        assert run.results[name] == sound_run.results[name]
    assert again.results[PREDICTION_OUTCOMES]["determined"] == 0
    assert b"Drift over time" in again.objects.get(again.results[assets.REPORT]["report"].removeprefix("s3://memory/"))


def test_a_training_set_that_was_vacuumed_away_is_no_verdict(sound: tuple[Trial, FakeRegistry], tmp_path: Path) -> None:
    tables = DeltaTableStore(str(tmp_path))
    sound[0].store(tables)
    for file in (tmp_path / "gold" / "training_set").glob("*.parquet"):
        file.unlink()
    champion = version("1", tables.version("gold/training_set"))
    found = data.read_populations(tables, PROFILE, champion, data.read_truth(tables, PROFILE))
    assert found.reference is None
    assert "train a new version" in found.why


def test_steps_are_those_of_the_contract() -> None:
    from clinical_orchestration.definitions import defs

    job = defs.resolve_job_def(MODEL_MONITORING.name)
    assert {node.name for node in job.graph.nodes} == set(MODEL_MONITORING.steps)
    upstream: dict[str, set[str]] = {node.name: set() for node in job.graph.nodes}
    for invocation, inputs in job.graph.dependencies.items():
        for dependency in inputs.values():
            upstream[invocation.name] |= {node.node for node in dependency.get_node_dependencies()}
    edges = {(a, b) for b, befores in upstream.items() for a in befores}
    assert edges == {(a, b) for a, b in MODEL_MONITORING.edges if a in upstream and b in upstream}
