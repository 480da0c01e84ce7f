"""The gateway over a Kafka in memory: what it accepts, refuses and says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from fastapi.testclient import TestClient

from clinical_orchestration.ingestion.gateway import MAX_RECORDS, create_app
from clinical_orchestration.settings import Variables
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

VITALS = {"patient_id": "secret-1", "timestamp": "2025-02-28T10:00:00Z", "heart_rate": 70}
BAD = {"patient_id": "secret-2", "timestamp": "2025-02-28T10:00:00Z", "heart_rate": 999, "schema_version": "7"}
NOW = datetime(2025, 3, 1, tzinfo=UTC)


@pytest.fixture
def kafka() -> FakeKafka:
    return FakeKafka()


def client_of(kafka: FakeKafka, **more: Any) -> TestClient:
    app = create_app(
        producer=lambda: kafka,
        admin=lambda: kafka,
        topics=Variables().topics(),
        trials=["simulated", "cdisc-pilot"],
        now=lambda: NOW,
        **more,
    )
    return TestClient(app)


@pytest.fixture
def client(kafka: FakeKafka) -> Iterator[TestClient]:
    with client_of(kafka) as made:
        yield made


def produced(kafka: FakeKafka, topic: str = "patient-vitals") -> list[Any]:
    return [message for partition in kafka.logs.get(topic, []) for message in partition.messages]


@pytest.mark.parametrize("name", ["patient-vitals", "patient_vitals"])
def test_a_record_is_produced_as_sent_and_answered_with_its_position(
    client: TestClient, kafka: FakeKafka, name: str
) -> None:
    body = b'{"patient_id": "secret-1",  "timestamp": "2025-02-28T10:00:00Z", "heart_rate": 7.0e1, "more": [1]}'
    answer = client.post(f"/records/{name}", content=body)
    assert answer.status_code == 200
    (message,) = produced(kafka)
    assert answer.json() == {
        "topic": "patient-vitals", "accepted": 1, "invalid": 0, "positions": [message.position], "errors": [],
    }  # fmt: skip
    assert (message.value, message.key, message.headers) == (body, b"secret-1", ())


def test_the_trial_becomes_a_header_and_must_exist(client: TestClient, kafka: FakeKafka) -> None:
    assert client.post("/records/patient-vitals?trial=simulated", json=VITALS).status_code == 200
    assert produced(kafka)[0].header("trial") == "simulated"
    answer = client.post("/records/patient-vitals?trial=other", json=VITALS)
    assert (answer.status_code, answer.json()["error"]) == (422, "unknown_trial")
    assert len(produced(kafka)) == 1


def test_a_batch_is_produced_with_one_flush_and_positions_in_its_order(client: TestClient, kafka: FakeKafka) -> None:
    batch = [{**VITALS, "patient_id": f"p{i}"} for i in range(1000)]
    answer = client.post("/records/patient-vitals", json=batch).json()
    assert (answer["accepted"], kafka.flushes) == (1000, 1)
    by_position = {message.position: message.key.decode() for message in produced(kafka)}
    assert [by_position[position] for position in answer["positions"]] == [f"p{i}" for i in range(1000)]


def test_lines_are_a_batch_too(client: TestClient, kafka: FakeKafka) -> None:
    body = orjson.dumps(VITALS) + b"\n\n" + orjson.dumps({**VITALS, "patient_id": "b"}) + b"\n"
    answer = client.post("/records/patient-vitals", content=body, headers={"content-type": "application/x-ndjson"})
    assert answer.json()["accepted"] == 2
    assert len(produced(kafka)) == 2


def test_one_invalid_record_stops_the_batch_and_all_reasons_are_given(client: TestClient, kafka: FakeKafka) -> None:
    answer = client.post("/records/patient-vitals", json=[VITALS, BAD, "text"])
    body = answer.json()
    assert answer.status_code == 422
    assert (body["accepted"], body["invalid"]) == (0, 2)
    assert [item["index"] for item in body["errors"]] == [1, 2]
    assert {reason.partition(":")[0] for reason in body["errors"][0]["reasons"]} == {
        "out_of_range", "unknown_schema_version",
    }  # fmt: skip
    assert "secret" not in answer.text
    assert produced(kafka) == []


def test_partial_produces_the_valid_and_names_the_others(client: TestClient, kafka: FakeKafka) -> None:
    answer = client.post("/records/patient-vitals?partial=true", json=[BAD, VITALS])
    assert answer.status_code == 200
    assert (answer.json()["accepted"], [item["index"] for item in answer.json()["errors"]]) == (1, [0])
    assert len(produced(kafka)) == 1
    assert client.post("/records/patient-vitals?partial=true", json=[BAD]).status_code == 422


@pytest.mark.parametrize(
    ("body", "error"),
    [(b'{"patient_id": ', "invalid_json"), (b"[]", "no_records"), (b"", "invalid_json"), (b"\xff", "invalid_json"),
     (b"null", "invalid_records")],
)  # fmt: skip
def test_what_is_no_record_is_refused(client: TestClient, kafka: FakeKafka, body: bytes, error: str) -> None:
    answer = client.post("/records/patient-vitals", content=body)
    assert (answer.status_code, answer.json()["error"]) == (422, error)
    assert answer.json()["what_to_do"]
    assert produced(kafka) == []


def test_an_invalid_line_is_named_by_its_place(client: TestClient) -> None:
    body = orjson.dumps(VITALS) + b"\n{broken\n"
    answer = client.post("/records/patient-vitals", content=body, headers={"content-type": "application/x-ndjson"})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"index": 1, "reasons": ["invalid_json: the line is not JSON"]}]


def test_an_unknown_topic_is_answered_with_those_there_are(client: TestClient) -> None:
    for answer in (client.post("/records/nope", json=VITALS), client.get("/schemas/nope")):
        assert answer.status_code == 404
        assert answer.json()["topics"] == list(Variables().topics().values())


def test_too_much_is_refused(kafka: FakeKafka) -> None:
    with client_of(kafka, max_body_bytes=1000) as client:
        assert client.post("/records/patient-vitals", content=b" " * 1001).status_code == 413
        chunks = (b" " * 400 for _ in range(5))
        assert client.post("/records/patient-vitals", content=chunks).status_code == 413  # no length announced
    with client_of(kafka) as client:
        many = b"[" + b",".join([b"1"] * (MAX_RECORDS + 1)) + b"]"
        assert client.post("/records/patient-vitals", content=many).status_code == 413
        large = client.post("/records/patient-vitals", json={**VITALS, "note": "x" * 1_000_000})
        assert "too_large" in large.json()["errors"][0]["reasons"][0]


def test_without_kafka_records_get_503_at_once_and_health_is_degraded(client: TestClient, kafka: FakeKafka) -> None:
    kafka.down = True
    answer = client.post("/records/patient-vitals", json=VITALS)
    assert (answer.status_code, answer.json()["error"]) == (503, "kafka_unavailable")
    assert "KAFKA_BOOTSTRAP_SERVERS" in answer.json()["what_to_do"]
    assert answer.headers["retry-after"] == "5"
    health = client.get("/health")
    assert (health.status_code, health.json()["status"], health.json()["kafka"]["status"]) == (200, "degraded", "down")


def test_it_works_again_when_kafka_is_back(kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clinical_orchestration.ingestion.gateway._STATE_SECONDS", 0.0)
    with client_of(kafka) as client:
        assert client.get("/health").json()["status"] == "healthy"
        kafka.down = True
        assert client.post("/records/patient-vitals", json=VITALS).json()["error"] == "not_delivered"
        assert client.post("/records/patient-vitals", json=VITALS).json()["error"] == "kafka_unavailable"
        kafka.down = False
        assert client.post("/records/patient-vitals", json=VITALS).status_code == 200


def test_a_batch_that_was_acknowledged_in_part_says_which(client: TestClient, kafka: FakeKafka) -> None:
    kafka.refuse_after = 2
    answer = client.post("/records/patient-vitals", json=[{**VITALS, "patient_id": f"p{i}"} for i in range(3)])
    assert answer.status_code == 503
    assert answer.json()["accepted"] == len(answer.json()["positions"]) == 2
    assert "again" in answer.json()["what_to_do"]


def test_where_kafka_is_not_installed_health_is_200_and_says_so(kafka: FakeKafka) -> None:
    with client_of(kafka, kafka_enabled=False) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()["kafka"]["status"]) == (200, "not_installed")
        answer = client.post("/records/patient-vitals", json=VITALS)
        assert (answer.status_code, "not installed" in answer.json()["what_to_do"]) == (503, True)
    assert kafka.logs == {}


def test_a_foreign_web_page_cannot_send_records(client: TestClient, kafka: FakeKafka) -> None:
    for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "https://elsewhere.example"}):
        assert client.post("/records/patient-vitals", json=VITALS, headers=headers).status_code == 403
    assert produced(kafka) == []


def test_schemas_are_published(client: TestClient) -> None:
    schema = client.get("/schemas/adverse-events").json()
    assert schema["title"] == "adverse_events"
    assert "event_timestamp" in schema["required"]


def test_metrics_count_outcomes_and_name_nobody(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client.post("/records/patient-vitals", json=[VITALS, VITALS])
    client.post("/records/patient-vitals", json=BAD)
    text = client.get("/metrics").text
    assert 'clinical_gateway_records_total{outcome="accepted",topic="patient-vitals"} 2.0' in text
    assert 'clinical_gateway_records_total{outcome="invalid",topic="patient-vitals"} 1.0' in text
    assert 'clinical_gateway_invalid_reasons_total{rule="out_of_range",topic="patient-vitals"} 1.0' in text
    assert 'clinical_gateway_requests_total{status="422",topic="patient-vitals"} 1.0' in text
    assert "secret" not in text
    assert "secret" not in caplog.text
