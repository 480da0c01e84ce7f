"""The gateway as a process of its own in front of a real broker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest

pytestmark = pytest.mark.integration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "clinical_orchestration.ingestion.gateway", "--port", str(port)],
        env={**os.environ, **environment},
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return process, url


@pytest.fixture
def topic() -> str:
    return f"vitals-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def gateway(kafka_env: dict[str, str], topic: str) -> Iterator[str]:
    process, url = started({**kafka_env, "CLINICAL_VAR_KAFKA_PATIENT_VITALS_TOPIC": topic})
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)


def test_a_batch_of_a_thousand_is_in_kafka_when_it_is_answered(
    gateway: str, kafka_env: dict[str, str], topic: str
) -> None:
    from kafka import KafkaConsumer

    batch = [
        {"patient_id": f"p{i % 40}", "timestamp": "2025-01-01T00:00:00Z", "heart_rate": 60 + i % 50, "source": f"m{i}"}
        for i in range(1000)
    ]
    answer = httpx.post(f"{gateway}/records/patient_vitals?trial=simulated", json=batch, timeout=30)
    assert answer.status_code == 200
    assert len(set(answer.json()["positions"])) == 1000
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=kafka_env["KAFKA_BOOTSTRAP_SERVERS"],
        auto_offset_reset="earliest",
        consumer_timeout_ms=5000,
    )
    found = {}
    for message in consumer:
        found[f"{message.topic}-{message.partition}-{message.offset}"] = message
        if len(found) == 1000:
            break
    consumer.close()
    assert found.keys() == set(answer.json()["positions"])
    assert all(("trial", b"simulated") in message.headers for message in found.values())

    started_at = time.monotonic()
    for _ in range(3):
        assert httpx.post(f"{gateway}/records/{topic}", json=batch, timeout=30).status_code == 200
    assert (time.monotonic() - started_at) / 3 < 3.0  # 0.05 to 0.1 s when the machine does nothing else


def test_without_a_broker_it_starts_and_says_what_to_do() -> None:
    process, url = started({"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}", "CLINICAL_KAFKA_ENABLED": "true"})
    try:
        record = {"patient_id": "p", "timestamp": "2025-01-01T00:00:00Z", "heart_rate": 60}
        answer = httpx.post(f"{url}/records/patient-vitals", json=record, timeout=30)
        assert (answer.status_code, answer.json()["error"]) == (503, "kafka_unavailable")
        assert httpx.get(f"{url}/health", timeout=10).json()["status"] == "degraded"
    finally:
        process.terminate()
        process.wait(20)
