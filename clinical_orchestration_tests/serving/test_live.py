"""The server as it runs: its own process, Redis, MLflow and S3."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clinical_orchestration.serving.prediction_log import PredictionLog
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.online import OnlineFeatures, RedisOnlineStore
from clinical_orchestration.stores.predictions import PredictionTable
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import PREDICTIONS
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.serving.live import live_server, register

pytestmark = pytest.mark.integration

PROFILE = load_trial("cdisc-pilot")
NAMES = ("age_years", "heart_rate_latest")


def estimator(slope: float) -> tuple[Any, Any]:
    """A logistic regression that rises with age, and its example."""
    import pandas as pd
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(60, 10, size=(200, 2)), columns=list(NAMES))
    labels = (slope * (rows["age_years"] - 60) + rng.normal(0, 5, 200) > 0).astype(int)
    pipeline = Pipeline([("impute", SimpleImputer()), ("model", LogisticRegression())]).fit(rows, labels)
    return pipeline, pd.DataFrame([[60.0, 60.0]], columns=list(NAMES))


@pytest.fixture(scope="module")
def environment(mlflow_env: dict[str, str], redis_env: dict[str, str]) -> dict[str, str]:
    # MLflow brings an S3 of its own, which serves the tables as well
    return {**mlflow_env, "REDIS_URL": redis_env["REDIS_URL"], "CLINICAL_LAKE_ROOT": "s3://clinical-mlops/serving-test"}


@pytest.fixture(scope="module")
def registry(environment: dict[str, str]) -> ModelRegistry:
    return ModelRegistry(environment["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="module")
def versions(registry: ModelRegistry) -> tuple[str, str]:
    return tuple(register(registry, PROFILE, NAMES, *estimator(s), mark=f"slope {s}") for s in (1.0, -1.0))  # type: ignore[return-value]


@pytest.fixture
def settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ClientSettings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return ClientSettings()


@pytest.fixture
def patients(settings: ClientSettings) -> Iterator[tuple[str, str]]:
    store = RedisOnlineStore(settings.redis_url.get_secret_value())
    now = datetime.now(UTC)
    store.put(
        [
            OnlineFeatures("fresh", PROFILE.name, now - timedelta(days=1), {"age_years": 80.0}, "set"),
            OnlineFeatures("old", PROFILE.name, now - timedelta(days=4000), {"age_years": 40.0}, "set"),
        ]
    )
    yield ("fresh", "old")
    store.close()


def logged(settings: ClientSettings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = DeltaTableStore.from_settings(settings).read(PREDICTIONS).to_pylist()
    return rows


def test_the_whole_path(
    tmp_path: Path,
    environment: dict[str, str],
    settings: ClientSettings,
    registry: ModelRegistry,
    versions: tuple[str, str],
    patients: tuple[str, str],
) -> None:
    first, second = versions
    registry.withdraw_champion(PROFILE.model_name)
    answered: dict[str, dict[str, Any]] = {}
    with live_server(tmp_path, environment) as server:
        assert server.seconds_to_health < 10  # 2 s on a quiet machine
        early = httpx.post(f"{server.url}/predict", json={"patient_id": "fresh"}, timeout=10)
        assert (early.status_code, early.json()["error"]) in {(503, "no_model"), (503, "model_loading")}

        registry.set_champion(PROFILE.model_name, first)
        server.until_version(first, PROFILE.name)
        with httpx.Client(base_url=server.url, timeout=10) as client:
            fresh, old = (client.post("/predict", json={"patient_id": name}).json() for name in patients)
            assert (fresh["stale"], old["stale"]) == (False, True)
            assert fresh["probability"] > 0.5 > old["probability"]
            assert fresh["missing_features"] == 1
            assert "another definition" in fresh["warning"]  # this test's feature set has another id
            sent = client.post("/predict", json={"features": {"age_years": 80, "heart_rate_latest": None}}).json()
            assert sent["probability"] == pytest.approx(fresh["probability"], abs=1e-12)
            assert client.post("/predict", json={"patient_id": "nobody"}).status_code == 404
            answered |= {item["prediction_id"]: item for item in (fresh, old, sent)}

        # the alias moves while requests flow
        stop, outcomes = threading.Event(), []

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=10) as client:
                while not stop.is_set():
                    answer = client.post("/predict", json={"patient_id": "fresh"})
                    outcomes.append((answer.status_code, answer.json()))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        registry.set_champion(PROFILE.model_name, second)
        server.until_version(second, PROFILE.name, seconds=30)
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert {status for status, _ in outcomes} == {200}
        answered |= {answer["prediction_id"]: answer for _, answer in outcomes}
        by_version = {answer["model_version"] for _, answer in outcomes}
        assert by_version == {first, second}
        assert outcomes[-1][1]["probability"] < 0.5  # the second model falls with age

        metrics = httpx.get(f"{server.url}/metrics").text
        assert f'version="{second}"' in metrics
        server.until_logged()

    rows = {row["prediction_id"]: row for row in logged(settings)}
    assert rows.keys() == answered.keys()
    assert len(logged(settings)) == len(rows)
    for prediction_id, answer in answered.items():
        row = rows[prediction_id]
        shared = ("trial", "patient_id", "model_name", "model_version", "probability", "risk_band", "stale")
        assert [row[name] for name in shared] == [answer[name] for name in shared]
        assert row["predicted_at"] == datetime.fromisoformat(answer["predicted_at"])
        assert row["prediction_date"] == row["predicted_at"].date()
    assert json.loads(rows[fresh["prediction_id"]]["features"]) == {"age_years": 80.0, "heart_rate_latest": None}
    assert "fresh" not in (tmp_path / "serving.log").read_text()


def test_sigkill_loses_and_doubles_no_answered_prediction(
    tmp_path: Path,
    environment: dict[str, str],
    settings: ClientSettings,
    registry: ModelRegistry,
    versions: tuple[str, str],
) -> None:
    registry.set_champion(PROFILE.model_name, versions[0])
    answered: list[str] = []
    before = {row["prediction_id"] for row in logged(settings)}
    with live_server(tmp_path, environment) as server:
        server.until_version(versions[0], PROFILE.name)
        stop = threading.Event()

        def ask(url: str = server.url, stop: threading.Event = stop) -> None:
            with httpx.Client(base_url=url, timeout=10) as client:
                while not stop.is_set():
                    try:
                        answer = client.post("/predict", json={"instances": [{"features": {"age_years": 50}}] * 3})
                    except httpx.TransportError:
                        return  # killed before it answered
                    answered.extend(item["prediction_id"] for item in answer.json()["predictions"])

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(2.2)  # long enough that some rows are in the table and some are not
        server.kill()
        stop.set()
        for thread in threads:
            thread.join(10)
    assert len(answered) > 50
    log = PredictionLog(  # what the next start does first
        tmp_path / "serving" / "predictions", lambda: PredictionTable(DeltaTableStore.from_settings(settings))
    )
    log.start()
    assert log.flush(30.0)
    log.close()
    found = [row["prediction_id"] for row in logged(settings)]
    assert len(found) == len(set(found))
    assert set(answered) <= set(found) - before
    # rows whose answer the kill cut off may be there too, at most one request of each connection
    assert len(set(found) - before - set(answered)) <= 6


def test_with_everything_out_it_starts_and_says_what_to_do(tmp_path: Path) -> None:
    nowhere = {
        "REDIS_URL": "redis://user:hidden@127.0.0.1:1/0",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    }
    with live_server(tmp_path, nowhere) as server:
        deadline = time.monotonic() + 30
        while (health := server.get("/health"))["registry"]["state"] != "out" or health["online_store"][
            "state"
        ] != "out":
            assert time.monotonic() < deadline, health
            time.sleep(0.1)
        assert health["status"] == "no_model"
        started = time.monotonic()
        for body, error in (
            ({"patient_id": "P1"}, "online_store_unavailable"),
            ({"features": {"age_years": 1}}, "registry_unavailable"),
        ):
            answer = httpx.post(f"{server.url}/predict", json=body, timeout=10)
            assert (answer.status_code, answer.json()["error"]) == (503, error)
            assert "127.0.0.1:1" in answer.json()["detail"]
            assert "pipeline-manager.sh" in answer.json()["what_to_do"]
            assert answer.headers["retry-after"]
            assert "hidden" not in answer.text
        assert time.monotonic() - started < 5
        assert "clinical_serving_registry_up 0.0" in httpx.get(f"{server.url}/metrics").text
    text = (tmp_path / "serving.log").read_text()
    assert "hidden" not in text
    assert "Traceback" not in text
