"""The model registry on a real MLflow server with PostgreSQL and S3 artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clinical_orchestration.modeling.evaluate import curves, evaluate
from clinical_orchestration.modeling.plots import all_plots, evaluation_table
from clinical_orchestration.modeling.promotion import decide
from clinical_orchestration.modeling.results import Evaluation
from clinical_orchestration.modeling.train import (
    CrossValidation,
    FittedModel,
    TrainingData,
    cross_validate,
    fingerprint,
    fit_final,
    hyper_parameters,
)
from clinical_orchestration.stores.registry import (
    ModelFormatError,
    ModelNotFoundError,
    ModelRegistry,
    ModelVersionInfo,
    RegistryError,
    RegistryUnavailableError,
    TrainingRecord,
    TrainingRun,
)
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.modeling_frames import FEATURES, training_frame

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


class Trained:
    """A trained and evaluated model, made once."""

    def __init__(self) -> None:
        self.data = TrainingData.from_frame(training_frame(), FEATURES)
        self.result: CrossValidation = cross_validate(self.data, seed=7)
        self.evaluation: Evaluation = evaluate(
            self.result.labels, self.result.chosen_probabilities, self.result.subjects, groups=self.result.groups,
            replicates=200,
        )  # fmt: skip
        self.ensemble: FittedModel = fit_final(self.data, name="ensemble", seed=7)
        self.small: FittedModel = fit_final(self.data, name="xgboost", seed=7)

    def record(self, mark: str) -> TrainingRecord:
        return TrainingRecord(
            trial="cdisc-pilot",
            fingerprint=fingerprint(self.data, trial=mark, seed=7, folds=5),
            candidate="ensemble",
            feature_names=self.data.feature_names,
            feature_set="abc123",
            training_set_uri="s3://clinical-mlops/gold/training_set",
            training_set_version=4,
            training_set_digest=self.data.digest(),
            table_versions={"silver/patient_vitals": 3, "gold/patient_features": 9},
            row_counts={"training_rows": self.data.rows, "silver/patient_vitals": 29643},
            params={**hyper_parameters(), "seed": 7, "folds": 5},
            profile=load_trial("cdisc-pilot").model_dump(mode="json"),
            code_version="0.1.0",
            tags={"dagster_run_id": "run-1"},
        )

    def log(self, registry: ModelRegistry, mark: str, model: FittedModel) -> TrainingRun:
        experiment = registry.ensure_experiment()
        return registry.log_training(
            experiment,
            self.record(mark),
            model.estimator,
            self.data.typical_row(),
            metrics=self.result.metrics(),
            files={"cross_validation.npz": self.result.to_bytes()},
        )


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def registry(mlflow_env: dict[str, str]) -> Iterator[ModelRegistry]:
    # only the server's address is known to the client: artifacts must go through the server
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield ModelRegistry(mlflow_env["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="module")
def model_name() -> str:
    return f"predictor-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def run(registry: ModelRegistry, trained: Trained, model_name: str) -> TrainingRun:
    run = trained.log(registry, model_name, trained.ensemble)
    figures = all_plots(
        trained.result,
        trained.evaluation,
        curves(trained.result.labels, trained.result.chosen_probabilities, trained.result.subjects, replicates=20),
    )
    registry.log_evaluation(
        run.run_id, trained.evaluation, figures=figures, reports={"evaluation.md": evaluation_table(trained.evaluation)}
    )
    return run


@pytest.fixture(scope="module")
def version(registry: ModelRegistry, trained: Trained, model_name: str, run: TrainingRun) -> ModelVersionInfo:
    return registry.register(model_name, run.run_id, trained.evaluation)


def test_a_run_holds_everything_one_asks_about_a_model(
    registry: ModelRegistry, trained: Trained, run: TrainingRun
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(registry.tracking_uri)
    found = client.get_run(run.run_id)
    assert client.get_experiment(found.info.experiment_id).name == "clinical_adverse_events"
    assert found.info.status == "FINISHED"
    assert found.data.params["trial"] == "cdisc-pilot"
    assert found.data.params["delta_version/silver/patient_vitals"] == "3"
    assert found.data.params["rows/training_rows"] == "480"
    assert found.data.params["xgboost.max_depth"] == "2"
    assert found.data.tags["dagster_run_id"] == "run-1"
    assert found.data.metrics["auroc"] == pytest.approx(trained.evaluation.auroc.value)
    assert found.data.metrics["auroc_lower"] == pytest.approx(trained.evaluation.auroc.lower)
    assert found.data.metrics["candidate/xgboost/auroc"] == pytest.approx(trained.result.scores["xgboost"].auroc)
    assert any(name.startswith("site/") for name in found.data.metrics)
    dataset = found.inputs.dataset_inputs[0].dataset
    assert json.loads(dataset.profile) == {"rows": 480}
    assert json.loads(dataset.source) == {"uri": "s3://clinical-mlops/gold/training_set", "delta_version": 4}
    assert {item.path for item in client.list_artifacts(run.run_id, "plots")} == {
        "plots/roc.png", "plots/precision_recall.png", "plots/calibration.png", "plots/feature_importance.png",
    }  # fmt: skip
    assert json.loads(registry.read_file(run.run_id, "features.json")) == list(FEATURES)
    assert json.loads(registry.read_file(run.run_id, "profile.json"))["name"] == "cdisc-pilot"
    assert registry.read_file(run.run_id, "plots/roc.png").startswith(b"\x89PNG")
    again = CrossValidation.from_bytes(registry.read_file(run.run_id, "cross_validation.npz"))
    assert again.metrics() == trained.result.metrics()


def test_nothing_logged_names_a_subject(registry: ModelRegistry, run: TrainingRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(registry.tracking_uri)
    found = client.get_run(run.run_id)
    texts = [str(found.data.params), str(found.data.tags), str(found.data.metrics), str(found.inputs)]
    folder = client.download_artifacts(run.run_id, "", str(tmp_path))
    for base, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(base, name), "rb") as file:
                texts.append(file.read().decode("latin-1"))
    assert len(texts) > 10
    assert not any("SECRET" in text for text in texts)


def test_artifacts_are_in_s3(mlflow_env: dict[str, str], run: TrainingRun) -> None:
    from urllib.parse import urlsplit

    from minio import Minio

    address = urlsplit(mlflow_env["AWS_ENDPOINT_URL"])
    client = Minio(
        address.netloc, access_key=mlflow_env["AWS_ACCESS_KEY_ID"], secret_key=mlflow_env["AWS_SECRET_ACCESS_KEY"],
        secure=False, region=mlflow_env["AWS_REGION"],
    )  # fmt: skip
    names = [item.object_name or "" for item in client.list_objects("mlflow-artifacts", recursive=True)]
    assert any(run.run_id in name and name.endswith("evaluation.json") for name in names)
    assert any(name.endswith("model.skops") for name in names)


def test_the_version_carries_what_serving_and_people_need(version: ModelVersionInfo, trained: Trained) -> None:
    assert (version.version, version.trial, version.candidate) == ("1", "cdisc-pilot", "ensemble")
    assert (version.feature_set, version.training_set_version, version.promoted) == ("abc123", 4, None)
    assert version.tags["auroc"] == str(trained.evaluation.auroc)
    assert version.tags["code_version"] == "0.1.0"
    assert abs(version.created_at.timestamp() - time.time()) < 3600


def test_the_evaluation_comes_back_whole(registry: ModelRegistry, version: ModelVersionInfo, trained: Trained) -> None:
    assert registry.evaluation_of(version) == trained.evaluation


def test_a_loaded_model_answers_as_the_trained_one(
    registry: ModelRegistry, version: ModelVersionInfo, trained: Trained
) -> None:
    loaded = registry.load_model(version.name, version.version)
    expected = trained.ensemble.probabilities(trained.data.frame())
    for rows in (trained.data.features, trained.data.frame()[list(reversed(FEATURES))]):
        np.testing.assert_allclose(loaded.probabilities(rows), expected, rtol=1e-12)
    assert loaded.predict_proba(trained.data.features).shape == (480, 2)
    assert loaded.feature_names == tuple(FEATURES)
    assert (loaded.trial, loaded.feature_set, loaded.version) == ("cdisc-pilot", "abc123", "1")
    assert loaded.example is not None
    np.testing.assert_allclose(loaded.example, trained.data.typical_row().to_numpy())
    assert 0 < loaded.probabilities(loaded.example)[0] < 1
    assert 0 < loaded.probabilities(np.full((1, 6), np.nan))[0] < 1
    with pytest.raises(ValueError, match="rows of 6 features"):
        loaded.probabilities(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="1 features are missing, such as risk"):
        loaded.probabilities(trained.data.frame().drop(columns="risk"))


def test_registering_the_same_again_makes_no_new_version(
    registry: ModelRegistry, version: ModelVersionInfo, run: TrainingRun, trained: Trained
) -> None:
    assert registry.find_version(version.name, version.fingerprint) == version
    assert registry.find_version(version.name, "other") is None
    assert registry.find_version("nobody", version.fingerprint) is None
    assert registry.register(version.name, run.run_id, trained.evaluation) == version
    assert [item.version for item in registry.versions(version.name)] == ["1"]
    found = registry.find_run(run.experiment_id, run.fingerprint)
    assert found is not None
    assert (found.run_id, found.finished, found.candidate) == (run.run_id, True, "ensemble")
    assert registry.find_run(run.experiment_id, "other") is None


def test_the_champion_moves_and_can_be_withdrawn(
    registry: ModelRegistry, version: ModelVersionInfo, trained: Trained
) -> None:
    name = f"{version.name}-moves"
    assert registry.champion(name) is None  # no such model
    runs = [trained.log(registry, f"{name}-{number}", trained.small) for number in range(2)]
    first, second = (registry.register(name, run.run_id, trained.evaluation) for run in runs)
    assert registry.champion(name) is None  # a model, but no alias
    decision = decide(trained.evaluation, None, load_trial("cdisc-pilot").promotion)
    registry.record_decision(name, first.version, decision)
    registry.set_champion(name, first.version)
    champion = registry.champion(name)
    assert champion is not None
    assert (champion.version, champion.aliases, champion.promoted) == ("1", ("champion",), decision.promote)
    assert json.loads(registry.read_file(first.run_id, "decision.json"))["promote"] is decision.promote
    registry.set_champion(name, second.version)
    assert [(item.version, item.aliases) for item in registry.versions(name)] == [("2", ("champion",)), ("1", ())]
    with pytest.raises(ModelNotFoundError):
        registry.set_champion(name, "99")
    champion = registry.champion(name)
    assert champion is not None
    assert champion.version == "2"
    registry.withdraw_champion(name)
    registry.withdraw_champion(name)
    assert registry.champion(name) is None


def test_plain_mlflow_clients_work_with_the_address_alone(
    mlflow_env: dict[str, str], registry: ModelRegistry, version: ModelVersionInfo, trained: Trained
) -> None:
    registry.set_champion(version.name, version.version)
    code = (
        "import json, sys, warnings\n"
        "import mlflow, numpy as np\n"
        f"model = mlflow.pyfunc.load_model('models:/{version.name}@champion')\n"
        "example = model.input_example\n"
        f"again = mlflow.sklearn.load_model('models:/{version.name}@champion')\n"
        "print(json.dumps({'p': model.predict(example).tolist(), 'q': again.predict_proba(example).tolist(),"
        " 'inputs': model.metadata.signature.inputs.input_names(), 'metadata': model.metadata.metadata}))\n"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**environment, "MLFLOW_TRACKING_URI": mlflow_env["MLFLOW_TRACKING_URI"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = trained.ensemble.estimator.predict_proba(trained.data.typical_row())
    np.testing.assert_allclose(answer["p"], expected)
    np.testing.assert_allclose(answer["q"], expected)
    assert answer["inputs"] == list(FEATURES)
    assert answer["metadata"]["trial"] == "cdisc-pilot"


def test_a_run_that_fails_on_the_way_is_marked_and_not_found(registry: ModelRegistry, trained: Trained) -> None:
    from sklearn.dummy import DummyClassifier

    class Homemade(DummyClassifier):
        """A type that nobody declared to be safe."""

    experiment = registry.ensure_experiment()
    record = trained.record("homemade")
    estimator = Homemade().fit(trained.data.frame(), trained.data.labels)
    with pytest.raises(RegistryError):
        registry.log_training(experiment, record, estimator, trained.data.typical_row())
    from mlflow import MlflowClient

    filter_string = f"tags.fingerprint = '{record.fingerprint}'"
    assert registry.find_run(experiment, record.fingerprint) is None
    runs = MlflowClient(registry.tracking_uri).search_runs([experiment], filter_string)
    assert [item.info.status for item in runs] == ["FAILED"]
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        registry.register("nobody", runs[0].info.run_id, trained.evaluation)


@pytest.mark.parametrize("damage", ["format", "types", "signature"])
def test_a_model_that_is_not_ours_is_refused(
    registry: ModelRegistry, trained: Trained, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Someone else's version may become champion by hand: loading it must neither run its code nor guess its inputs."""
    import mlflow.sklearn
    from mlflow import MlflowClient
    from mlflow.models import infer_signature

    example = trained.data.typical_row()
    estimator = trained.small.estimator
    options: dict[str, Any] = {
        "serialization_format": "skops",
        "skops_trusted_types": ["numpy.dtype", "sklearn.tree._tree.Tree", "sklearn.utils._bunch.Bunch",
                                "xgboost.core.Booster", "xgboost.sklearn.XGBClassifier"],
        "signature": infer_signature(example, estimator.predict_proba(example)),
        "pip_requirements": ["scikit-learn"],
    }  # fmt: skip
    if damage == "format":
        options.update(serialization_format="cloudpickle", skops_trusted_types=None)
    elif damage == "signature":
        options["signature"] = False
    folder = tmp_path / "model"
    mlflow.sklearn.save_model(estimator, str(folder), **options)
    if damage == "types":
        monkeypatch.setattr("clinical_orchestration.stores.registry.TRUSTED_TYPES", ("numpy.dtype",))
    client = MlflowClient(registry.tracking_uri, registry.tracking_uri)
    run_id = client.create_run(registry.ensure_experiment()).info.run_id
    client.log_artifacts(run_id, str(folder), "model")
    name = f"foreign-{damage}-{uuid.uuid4().hex[:6]}"
    client.create_registered_model(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    version = client.create_model_version(name, source, run_id).version
    message = {"format": "skops format", "types": "not trusted", "signature": "no signature"}[damage]
    with pytest.raises(ModelFormatError, match=message):
        registry.load_model(name, version)


def test_what_is_missing_is_said(registry: ModelRegistry, version: ModelVersionInfo, trained: Trained) -> None:
    for ask in (
        lambda: registry.load_model(version.name, "99"),
        lambda: registry.load_model("nobody", "1"),
        lambda: registry.read_file(version.run_id, "nothing.json"),
        lambda: registry.read_file(version.run_id, "plots/nothing.png"),
        lambda: registry.read_file("0" * 32, "evaluation.json"),
        lambda: registry.register("nobody", "0" * 32, trained.evaluation),
    ):
        with pytest.raises(ModelNotFoundError):
            ask()
    assert registry.versions("nobody") == []
    with pytest.raises(RegistryError, match="quote"):
        registry.versions("it's")


def test_a_server_that_is_away_is_an_error_at_once_and_tells_no_secret() -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError, match="does not answer") as error:
        ModelRegistry("http://someone:hidden@127.0.0.1:9").champion("predictor")
    assert time.monotonic() - started < 30  # MLflow's own client would try for minutes
    assert "hidden" not in str(error.value)
