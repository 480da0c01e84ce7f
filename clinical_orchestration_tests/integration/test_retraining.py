"""Retraining on a real MLflow server and a real model server: promotion, failure, rollback, and what the page reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from clinical_orchestration.modeling.train import HYPER_PARAMETERS
from clinical_orchestration.page.models import read_models
from clinical_orchestration.serving.champions import ChampionManager
from clinical_orchestration.serving.registry import RegistryChampions
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration_tests.retraining_world import World, result_of

pytestmark = pytest.mark.integration

MODEL = "adverse-event-predictor"  # of a profile that ships, so that the page shows it


def test_the_server_follows_a_promotion_and_a_rollback(
    mlflow_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = mlflow_env["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("CLINICAL_VAR_ROLLBACK_WATCH_SECONDS", "0")
    monkeypatch.setitem(HYPER_PARAMETERS["random_forest"], "n_estimators", 20)
    monkeypatch.setitem(HYPER_PARAMETERS["xgboost"], "n_estimators", 40)
    registry = ModelRegistry(uri)
    world = World(tmp_path, registry, MODEL)
    served = ChampionManager(lambda: RegistryChampions(registry), [world.profile])
    world.fill(60, visits=6)
    first = world.train_champion()
    served.poll()
    state = served.current("small")
    assert state is not None
    assert state.version == first

    world.fill(150, seed=2, signal=-4.0, base=-0.5, first_subject=60, days_later=150, visits=6)
    second = result_of(world.run(), "retraining/deployment")
    assert second["outcome"] == "promoted"
    assert second["replaced"] == first
    served.poll()
    state = served.current("small")
    assert state is not None
    assert state.version == second["version"]
    shown = next(view for view in read_models(uri) if view.name == MODEL)
    assert shown.champion is not None
    assert shown.previous is not None
    assert (shown.champion.version, shown.previous.version) == (second["version"], first)
    assert shown.champion.since is not None
    assert [name for name, _ in shown.champion.metrics] == ["AUROC", "AUPRC", "Brier score", "calibration error"]

    world.server.answers, world.server.failures = 500, 400
    began = time.monotonic()
    outcome = result_of(world.run(force=True), "retraining/outcome")
    assert outcome["rolled_back"] is True
    served.poll()
    state = served.current("small")
    assert state is not None
    assert state.version == first
    assert time.monotonic() - began < 120
    shown = next(view for view in read_models(uri) if view.name == MODEL)
    assert shown.champion is not None
    assert shown.champion.version == first
    assert shown.previous is None
    (rollback,) = shown.rollbacks
    assert rollback.version == second["version"]
    assert "error_rate: 0.8000" in rollback.reason
    bad = next(info for info in registry.versions(MODEL) if info.version == second["version"])
    assert bad.tags["promotion"] == "rolled back"
    assert bad.tags["rolled_back_at"]

    # labels that were shuffled: refused, told beside the rollback
    world.server.answers = world.server.failures = 0
    world.empty()
    world.fill(110, seed=3, shuffled=True)
    shuffled = result_of(world.run(force=True), "retraining/deployment")
    assert shuffled["outcome"] == "refused"
    tags = next(info for info in registry.versions(MODEL) if info.version == shuffled["version"]).tags
    assert (tags["promotion"], tags["decision"]) == ("refused", "refuse")
    shown = next(view for view in read_models(uri) if view.name == MODEL)
    assert shown.champion is not None
    assert shown.champion.version == first
    assert [(item.version, item.reason) for item in shown.refused] == [(shuffled["version"], tags["decision_reasons"])]
    assert [item.version for item in shown.rollbacks] == [second["version"]]
