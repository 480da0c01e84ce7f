import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clinical_orchestration.serving import engine as engine_module
from clinical_orchestration.serving.datamodels import MAX_INSTANCES, HealthAnswer, ModelsAnswer, PredictionAnswer
from clinical_orchestration.serving.ports import ModelLoadError
from clinical_orchestration_tests.serving.fakes import FEATURES, NOW, PILOT, SIMULATED, Server, model, running, wait_for


def probability_from_age(rows: Any) -> Any:
    return np.nan_to_num(rows[:, 0], nan=50.0) / 100


def refused(server: Server, body: Any, status: int, error: str) -> dict[str, str]:
    answer = server.predict(body, status)
    assert answer.keys() == {"error", "detail", "what_to_do"}
    assert answer["error"] == error
    assert answer["what_to_do"]
    return answer


def test_a_patient_is_predicted_from_online_features(tmp_path: Path) -> None:
    with running(tmp_path, model=model(probability_from_age)) as server:
        server.online.add("P1", age_years=30.0, lab_alt_latest=12.0)
        answer = server.predict({"patient_id": "P1"})
    PredictionAnswer.model_validate(answer)
    prediction_id = answer.pop("prediction_id")
    assert answer == {
        "patient_id": "P1",
        "trial": "cdisc-pilot",
        "model_name": "adverse-event-predictor",
        "model_version": "1",
        "probability": 0.3,
        "risk_band": "medium",
        "predicted_at": "2026-03-01T12:00:00+00:00",
        "feature_time": "2026-02-28T12:00:00+00:00",
        "feature_age_seconds": 86400.0,
        "stale": False,
        "warning": None,
        "missing_features": 1,
        "feature_count": 3,
    }
    (logged,) = server.sink.rows  # flushed by the shutdown
    assert logged["prediction_id"] == prediction_id
    assert logged["probability"] == 0.3
    assert json.loads(logged["features"]) == {"age_years": 30.0, "heart_rate_latest": None, "lab_alt_latest": 12.0}


def test_features_are_given_to_the_model_in_its_own_order(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def predict(rows: Any) -> Any:
        seen.extend(rows.tolist())
        return np.full(len(rows), 0.9)

    with running(tmp_path, model=model(predict)) as server:
        server.predict({"features": {"lab_alt_latest": 3, "age_years": 1.5}})
    assert seen[-1][0] == 1.5
    assert np.isnan(seen[-1][1])
    assert seen[-1][2] == 3.0


@pytest.mark.parametrize(
    ("probability", "band"), [(0.0, "low"), (0.2499, "low"), (0.25, "medium"), (0.5, "high"), (1.0, "high")]
)
def test_risk_bands_are_those_of_the_profile(probability: float, band: str) -> None:
    assert engine_module.risk_band(PILOT, probability) == band


def test_features_of_a_historic_trial_are_stale_and_say_why(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.online.add("P1", age=timedelta(days=4000))
        answer = server.predict({"patient_id": "P1"})
        assert answer["stale"] is True
        assert answer["feature_age_seconds"] == 4000 * 86400
        assert "4,000 days ago" in answer["warning"]
        assert "35 days" in answer["warning"]
        server.online.add("P2", age=timedelta(days=34))
        assert server.predict({"patient_id": "P2"})["stale"] is False
        metrics = server.client.get("/metrics").text
        assert 'clinical_serving_stale_predictions_total{trial="cdisc-pilot"} 1.0' in metrics


def test_age_of_sent_features_is_known_only_when_their_time_is() -> None:
    assert engine_module.freshness(PILOT, None, NOW) == (None, False, None)
    assert engine_module.freshness(PILOT, NOW + timedelta(hours=11), NOW) == (0.0, False, None)  # end of today
    age, stale, warning = engine_module.freshness(PILOT, NOW + timedelta(days=3), NOW)
    assert (age, stale) == (0.0, False)
    assert warning is not None
    assert "future" in warning


def test_sent_feature_time_decides_staleness(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = server.predict({"features": {"age_years": 1}, "feature_time": "2014-01-02T23:59:59+01:00"})
        assert answer["stale"] is True
        assert answer["feature_time"] == "2014-01-02T23:59:59+01:00"


def test_unknown_patient_is_404_and_not_repeated(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = refused(server, {"patient_id": "SECRET-1"}, 404, "unknown_patient")
        assert "SECRET-1" not in json.dumps(answer)
        assert "clinical_data_pipeline" in answer["what_to_do"]


@pytest.mark.parametrize(
    ("body", "error", "part"),
    [
        ({}, "invalid_request", "exactly one of patient_id and features"),
        ({"patient_id": "P", "features": {"age_years": 1}}, "invalid_request", "exactly one"),
        ({"patient_id": ""}, "invalid_request", "patient_id"),
        ({"patient_id": 7}, "invalid_request", "patient_id"),
        ({"patient_id": "P", "feature_time": "2026-01-01T00:00:00Z"}, "invalid_request", "feature_time"),
        ({"features": {"age_years": "old"}}, "invalid_request", "features.age_years"),
        ({"features": {"age_years": True}}, "invalid_request", "features.age_years"),
        ({"features": {"age_years": 1}, "feature_time": "2026-01-01T00:00:00"}, "invalid_request", "timezone"),
        ({"features": {"age_yaers": 1}}, "unknown_features", "age_yaers"),
        ({"features": {}}, "no_feature_values", "missing"),
        ({"features": {"age_years": None}}, "no_feature_values", "missing"),
        ({"features": {"age_years": 1}, "trial": "no-such"}, "unknown_trial", "no such trial"),
        ({"features": {"age_years": 1}, "extra": 1}, "invalid_request", "extra"),
        ({"instances": []}, "invalid_request", "1 to 1,000"),
        ({"instances": [{"patient_id": "P"}], "trial": "x"}, "invalid_request", "no other"),
        ({"instances": [{"patient_id": "P"}] * (MAX_INSTANCES + 1)}, "invalid_request", "1 to 1,000"),
        ([], "invalid_request", "object"),
    ],
)
def test_invalid_input_is_422_and_says_what(tmp_path: Path, body: Any, error: str, part: str) -> None:
    with running(tmp_path) as server:
        assert part in refused(server, body, 422, error)["detail"]


@pytest.mark.parametrize("text", ['{"features": {"age_years": NaN}}', '{"features": {"age_years": Infinity}}', "{", ""])
def test_what_is_no_json_is_422(tmp_path: Path, text: str) -> None:
    with running(tmp_path) as server:
        answer = server.client.post("/predict", content=text)
        assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")


def test_numbers_beyond_double_precision_are_refused(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = server.client.post("/predict", content='{"features": {"age_years": 1e999}}')
        assert answer.status_code == 422


def test_error_texts_never_repeat_values(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = server.client.post(
            "/predict", json={"patient_id": ["SECRET-1"], "features": {"age_years": "SECRET-2"}}
        )
        assert "SECRET" not in answer.text


def test_a_patient_s_own_trial_picks_the_model(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.registry.promote("7", model(0.8), SIMULATED.model_name)
        server.until_served("7", SIMULATED.name)
        server.online.add("P1")
        server.online.add("S1", trial=SIMULATED.name)
        assert server.predict({"patient_id": "P1"})["model_version"] == "1"
        answer = server.predict({"patient_id": "S1"})
        assert (answer["trial"], answer["model_version"]) == ("simulated", "7")
        assert server.predict({"features": {"age_years": 1}, "trial": "simulated"})["model_version"] == "7"
        refused(server, {"patient_id": "S1", "trial": "cdisc-pilot"}, 422, "trial_mismatch")


def test_a_patient_of_a_trial_without_profile_is_503(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.online.add("P1", trial="elsewhere")
        refused(server, {"patient_id": "P1"}, 503, "trial_not_served")


def test_no_model_yet_is_503_and_health_says_so(tmp_path: Path) -> None:
    with running(tmp_path, model=None) as server:
        server.online.add("P1")
        answer = refused(server, {"patient_id": "P1"}, 503, "no_model")
        assert "clinical_data_pipeline" in answer["what_to_do"]
        assert server.client.post("/predict", json={"patient_id": "P1"}).headers["Retry-After"]
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "no_model")
        server.registry.promote("1", model())
        server.until_served("1")
        assert server.predict({"patient_id": "P1"})["model_version"] == "1"


def test_registry_out_before_any_model_is_503(tmp_path: Path) -> None:
    with running(tmp_path, model=None) as server:
        server.registry.out = True
        wait_for(lambda: server.app.state.manager.registry_error)
        refused(server, {"features": {"age_years": 1}}, 503, "registry_unavailable")


def test_registry_out_later_leaves_the_model_serving_and_degrades_health(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.registry.out = True
        wait_for(lambda: server.app.state.manager.registry_error)
        server.predict({"features": {"age_years": 1}})
        health = server.client.get("/health").json()
        assert (health["status"], health["registry"]["state"]) == ("degraded", "out")
        server.registry.out = False
        wait_for(lambda: server.client.get("/health").json()["status"] == "healthy")


def test_online_store_out_is_503_for_patients_only(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.online.add("P1")
        server.online.out = True
        answer = refused(server, {"patient_id": "P1"}, 503, "online_store_unavailable")
        assert "REDIS_URL" in answer["what_to_do"]
        server.predict({"features": {"age_years": 1}})
        health = server.client.get("/health").json()
        assert (health["status"], health["online_store"]["state"]) == ("degraded", "out")
        server.online.out = False
        wait_for(lambda: server.client.post("/predict", json={"patient_id": "P1"}).status_code == 200)


def test_one_unreadable_patient_does_not_fail_the_others(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.online.add("good")
        server.online.add("bad")
        server.online.unreadable = frozenset({"bad"})
        answer = server.predict({"instances": [{"patient_id": "bad"}, {"patient_id": "good"}]})
        assert answer["predictions"][0]["error"] == "online_features_unreadable"
        assert answer["predictions"][1]["probability"] == 0.3


def test_batch_answers_in_order_with_an_error_in_each_refused_place(tmp_path: Path) -> None:
    with running(tmp_path, model=model(probability_from_age)) as server:
        server.online.add("P1", age_years=10.0)
        body = {
            "instances": [
                {"features": {"age_years": 20}},
                {"patient_id": "nobody"},
                {"patient_id": "P1"},
                {"features": {"typo": 1}},
                {"features": {"age_years": 40}},
                "nonsense",
            ]
        }
        for path in ("/predict", "/predict/batch"):
            answer = server.client.post(path, json=body).json()
            assert (answer["succeeded"], answer["failed"]) == (3, 3)
            shown = [item.get("probability", item.get("error")) for item in answer["predictions"]]
            assert shown == [0.2, "unknown_patient", 0.1, "unknown_features", 0.4, "invalid_request"]
            assert [item["status"] for item in answer["predictions"] if "error" in item] == [404, 422, 422]
    assert sorted(row["probability"] for row in server.sink.rows) == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]


def test_the_largest_batch_is_answered(tmp_path: Path) -> None:
    with running(tmp_path, model=model(probability_from_age)) as server:
        ages = [number % 100 for number in range(MAX_INSTANCES)]
        answer = server.predict({"instances": [{"features": {"age_years": age}} for age in ages]})
        assert [item["probability"] for item in answer["predictions"]] == [age / 100 for age in ages]


def test_a_batch_that_fails_only_for_passing_reasons_is_503(tmp_path: Path) -> None:
    with running(tmp_path, model=None) as server:
        refused(server, {"instances": [{"features": {"age_years": 1}}] * 2}, 503, "no_model")


def test_batch_path_without_instances_is_422(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        assert server.client.post("/predict/batch", json={"patient_id": "P1"}).status_code == 422


def test_a_body_that_is_too_large_is_413(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = server.client.post("/predict", content=b'{"patient_id": "' + b"x" * 17 * 2**20 + b'"}')
        assert (answer.status_code, answer.json()["error"]) == (413, "too_large")


def test_a_model_that_fails_on_one_row_answers_the_others(tmp_path: Path) -> None:
    def picky(rows: Any) -> Any:
        if (rows[:, 0] == 13).any():
            raise ValueError("unlucky")
        return np.where(rows[:, 0] == 14, np.nan, 0.5)

    with running(tmp_path, model=model(picky)) as server:
        ages = [1, 13, 14, 2]
        answer = server.predict({"instances": [{"features": {"age_years": age}} for age in ages]})
        shown = [item.get("error") for item in answer["predictions"]]
        assert shown == [None, "model_failed", "model_failed", None]
        refused(server, {"features": {"age_years": 13}}, 500, "model_failed")


def test_too_much_waiting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_WAITING", 1)
    with running(tmp_path) as server:
        refused(server, {"instances": [{"features": {"age_years": 1}}] * 2}, 503, "overloaded")
        server.predict({"features": {"age_years": 1}})


def test_requests_that_come_together_share_a_model_call(tmp_path: Path) -> None:
    sizes: list[int] = []

    def slow(rows: Any) -> Any:
        sizes.append(len(rows))
        time.sleep(0.05)
        return np.full(len(rows), 0.1)

    with running(tmp_path, model=model(slow)) as server:
        sizes.clear()
        threads = [
            threading.Thread(target=server.predict, args=({"features": {"age_years": 1}},), daemon=True)
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sum(sizes) == 12
        assert max(sizes) >= 5


def test_a_new_champion_takes_over_without_a_failed_request(tmp_path: Path) -> None:
    answers: list[tuple[int, str]] = []
    with running(tmp_path) as server:
        server.online.add("P1")
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answer = server.client.post("/predict", json={"patient_id": "P1"})
                answers.append((answer.status_code, answer.json().get("model_version", "")))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for version in ("2", "3"):
            server.registry.promote(version, model(0.4))
            server.until_served(version)
        wait_for(lambda: answers and answers[-1][1] == "3")
        stop.set()
        for thread in threads:
            thread.join(5)
    assert {status for status, _ in answers} == {200}
    assert {"1", "3"} <= {version for _, version in answers}


def test_a_champion_that_cannot_be_loaded_is_reported_and_the_old_one_stays(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.registry.promote("2", ModelLoadError("its signature names no features"))
        wait_for(lambda: server.client.get("/health").json()["status"] == "degraded")
        health = server.client.get("/health").json()
        assert health["models"]["cdisc-pilot"]["state"] == "failing"
        assert health["models"]["cdisc-pilot"]["model_version"] == "1"
        assert "version 2 cannot be loaded: its signature" in health["problems"][0]
        assert server.predict({"features": {"age_years": 1}})["model_version"] == "1"
        metrics = server.client.get("/metrics").text
        assert 'clinical_serving_model_failing{trial="cdisc-pilot"} 1.0' in metrics
        assert 'clinical_serving_model_load_failures_total{trial="cdisc-pilot"} 1.0' in metrics
        server.registry.promote("3", model())
        server.until_served("3")
        assert server.client.get("/health").json()["status"] == "healthy"


def test_health_shows_models_and_log(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        wait_for(lambda: server.client.get("/health").json()["online_store"]["state"] in {"up", "connecting"})
        answer = HealthAnswer.model_validate(server.client.get("/health").json())
        assert answer.models["cdisc-pilot"].state == "serving"
        assert answer.models["simulated"].state == "no_model"
        assert answer.prediction_log["backlog"] == 0
        server.sink.out = True
        server.predict({"features": {"age_years": 1}})
        wait_for(lambda: server.client.get("/health").json()["status"] == "degraded")
        assert server.client.get("/health").json()["prediction_log"]["backlog"] == 1
        server.sink.out = False


def test_models_lists_what_serves_with_its_features(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = ModelsAnswer.model_validate(server.client.get("/models").json())
        (served,) = answer.models
        assert served.feature_names == list(FEATURES)
        assert served.loaded_at > datetime(2026, 1, 1, tzinfo=UTC)


def test_metrics_count_requests_and_predictions_and_hold_no_identifier(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.online.add("SECRET-1")
        server.predict({"patient_id": "SECRET-1"})
        server.predict({"patient_id": "SECRET-2"}, 404)
        server.client.get("/nothing/SECRET-3")
        wait_for(lambda: server.app.state.log.state().backlog == 0)
        text = server.client.get("/metrics").text
        assert "SECRET" not in text
        for line in (
            'clinical_serving_requests_total{endpoint="/predict",status="200"} 1.0',
            'clinical_serving_requests_total{endpoint="/predict",status="404"} 1.0',
            'clinical_serving_requests_total{endpoint="other",status="404"} 1.0',
            'clinical_serving_predictions_total{risk_band="medium",trial="cdisc-pilot"} 1.0',
            'clinical_serving_refused_instances_total{error="unknown_patient"} 1.0',
            'clinical_serving_model_info{model_name="adverse-event-predictor",trial="cdisc-pilot",version="1"} 1.0',
            "clinical_serving_prediction_log_written_total 1.0",
            "clinical_serving_prediction_log_backlog 0.0",
        ):
            assert line in text
        assert "clinical_serving_request_seconds_bucket" in text


def test_logs_hold_no_identifier_and_no_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(rows: Any) -> Any:
        if len(rows) and rows[0, 0] == 77.125:
            raise ValueError(f"bad value {rows[0, 0]}")
        return np.full(len(rows), 0.5)

    with running(tmp_path, model=model(fails)) as server:
        server.online.add("SECRET-1", age_years=77.125)
        server.predict({"patient_id": "SECRET-1"}, 500)
    assert "failed on 1 rows" in caplog.text
    assert "SECRET" not in caplog.text
    assert "77.125" not in caplog.text


def test_a_full_disk_does_not_stop_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as server:

        def full(rows: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(server.app.state.log._drain.spool, "append", full)
        answer = server.predict({"features": {"age_years": 1}})
        wait_for(lambda: server.sink.ids() == [answer["prediction_id"]])
        health = server.client.get("/health").json()
        assert health["status"] == "degraded"
        assert "No space left" in health["problems"][0]
        monkeypatch.undo()


def test_every_other_path_and_method_answers_the_same_shape(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        for answer, status in ((server.client.get("/nothing"), 404), (server.client.get("/predict"), 405)):
            assert answer.status_code == status
            assert answer.json().keys() == {"error", "detail", "what_to_do"}
        assert server.client.get("/").json()["docs"] == "/docs"
        assert server.client.get("/docs").status_code == 200


def test_openapi_describes_bodies_with_working_examples(tmp_path: Path) -> None:
    with running(tmp_path, model=model(0.3, ("heart_rate_mean_7d", "systolic_bp_latest", "age_years"))) as server:
        schema = server.client.get("/openapi.json").json()
        text = json.dumps(schema)
        for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
            assert reference in schema["components"]["schemas"]
        operation = schema["paths"]["/predict"]["post"]
        assert {"200", "404", "413", "422", "500", "503"} <= operation["responses"].keys()
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        for patient in ("01-701-1015", "01-701-1023"):
            server.online.add(patient)
        for example in examples.values():
            server.predict(example["value"])
