"""The models client on a real MLflow server: an own run, and a training run from registration to champion."""

from __future__ import annotations

import uuid

import pytest

from clinical_orchestration.clients import ClientError, Models
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration_tests.integration.test_registry import Trained

pytestmark = pytest.mark.integration


@pytest.fixture
def models(mlflow_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_env["MLFLOW_TRACKING_URI"])
    client = Models("cdisc-pilot")
    # a model of its own: other tests promote versions of the trial's
    client.profile = client.profile.model_copy(update={"model_name": f"client-{uuid.uuid4().hex[:8]}"})
    return client


def test_a_run_of_ones_own_is_logged_with_all_it_was_given(models: Models) -> None:
    run = models.log_run(
        "analyses", name="ages", params={"bins": 5}, metrics={"mean": 75.1}, files={"notes/a.txt": b"x"},
        tags={"by": "test"},
    )  # fmt: skip
    assert models.create_experiment("analyses") == models.create_experiment("analyses")
    assert models.registry.run_params(run) == {"bins": "5"}
    assert models.registry.read_file(run, "notes/a.txt") == b"x"
    stored = models.registry._client().get_run(run)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics == {"mean": 75.1}
    assert (stored.data.tags["trial"], stored.data.tags["by"]) == ("cdisc-pilot", "test")
    with pytest.raises(ClientError, match="cannot be registered"):
        models.register(run)


def test_a_training_run_becomes_version_and_champion_by_the_rule(models: Models) -> None:
    trained = Trained()
    registry: ModelRegistry = models.registry
    run = trained.log(registry, uuid.uuid4().hex, trained.small)
    registry.log_evaluation(run.run_id, trained.evaluation)
    assert models.champion() is None
    with pytest.raises(ClientError, match="has no champion yet"):
        models.load()
    version = models.register(run.run_id)
    assert models.register(run.run_id).version == version.version
    decision = models.promote(version.version)
    assert decision.promote, decision.reasons
    champion = models.champion()
    assert champion is not None
    assert champion.version == version.version
    assert "champion" in models.versions()["aliases"][0].to_list()
    probabilities = models.load().probabilities(trained.data.typical_row())
    assert 0 <= probabilities[0] <= 1
    assert models.evaluation().auroc.value == pytest.approx(trained.evaluation.auroc.value)
    with pytest.raises(ClientError, match="has no version 99"):
        models.promote("99")
