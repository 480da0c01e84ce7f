"""The sensors on real Kafka, S3 and Redis: what they decide, and how long that takes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest

from clinical_orchestration.defs.sensors import SENSORS
from clinical_orchestration.defs.sensors.requests import Cursor
from clinical_orchestration.features.definitions import feature_set_id
from clinical_orchestration.ingestion.kafka import ingest_topics
from clinical_orchestration.resources import build_resources
from clinical_orchestration.settings import ClientSettings, Variables
from clinical_orchestration.stores.kafka import Record, producer, topic_admin, topic_reader
from clinical_orchestration.stores.objects import ObjectStore
from clinical_orchestration.stores.online import OnlineFeatures, RedisOnlineStore
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS, FEATURES, arrow_schema
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import vitals_message

pytestmark = pytest.mark.integration

PATIENTS = 300
THEN = datetime(2025, 1, 10, 12, tzinfo=UTC)


@pytest.fixture
def services(
    s3_env: dict[str, str],
    redis_env: dict[str, str],
    kafka_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    mine = {
        "CLINICAL_HOME": str(tmp_path),
        "CLINICAL_LAKE_ROOT": f"s3://clinical-mlops/sensors-{time.time_ns()}",
        "CLINICAL_VAR_FEATURE_STORE_REDIS_PREFIX": f"sensors-{time.time_ns()}:",
        "CLINICAL_VAR_CLINICAL_DATA_MINIMUM_RECORDS": "500",
        "CLINICAL_VAR_KAFKA_LAG_ALERT_MESSAGES": "100",
        "CLINICAL_VAR_KAFKA_PATIENT_VITALS_TOPIC": f"vitals-{time.time_ns()}",
    }
    # each environment has the addresses of a whole stack of which only one service runs
    parts = ((s3_env, "AWS_"), (redis_env, "REDIS_URL"), (kafka_env, "KAFKA_"), (mine, "CLINICAL_"))
    for environment, prefix in parts:
        for name, value in environment.items():
            if name.startswith(prefix):
                monkeypatch.setenv(name, value)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def evaluate(name: str, instance: dg.DagsterInstance, cursor: str) -> tuple[float, dg.SensorDefinition, object]:
    sensor = next(sensor for sensor in SENSORS if sensor.name == name)
    context = dg.build_sensor_context(instance=instance, cursor=cursor, sensor_name=name, resources=build_resources())
    began = time.monotonic()
    data = sensor.evaluate_tick(context)
    return time.monotonic() - began, sensor, data


def test_sensors_decide_on_real_services_within_a_second_when_warm(
    services: None,
    instance: dg.DagsterInstance,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    topic = Variables().kafka_patient_vitals_topic
    topic_admin().ensure_topics([topic], partitions=3)
    records = [Record(topic, json.dumps(vitals_message(number)).encode()) for number in range(600)]
    producer().send(records)
    settings, variables = ClientSettings(), Variables()
    tables = DeltaTableStore.from_settings()
    rows = [
        {"trial": "simulated", "patient_id": f"P{number}", "feature_time": THEN, "feature_date": THEN.date()}
        for number in range(PATIENTS)
    ]
    tables.append(FEATURES, pa.Table.from_pylist(rows, schema=arrow_schema(FEATURE_KEY_COLUMNS)))
    ObjectStore.from_settings().put("landing/simulated/vs.csv", b"a\n1\n")
    ObjectStore.from_settings().put("landing/simulated/_SUCCESS", b"")
    cursor = Cursor("2026").dumps()
    expected = {
        "clinical_data_sensor": "600 new records",
        "landing_files_sensor": "1 new files in the landing folder of simulated",
        "feature_store_sensor": f"{PATIENTS} without online features",
    }
    seconds = {}
    for name, said in expected.items():
        evaluate(name, instance, cursor)
        seconds[name], _, data = evaluate(name, instance, cursor)
        (request,) = data.run_requests  # type: ignore[attr-defined]
        assert said in request.tags["clinical/reason"], name
    # a whole profile's features a patient, as many as there are in the largest trial that ships
    profile = load_trial("simulated")
    store = RedisOnlineStore(settings.redis_url.get_secret_value(), variables.feature_store_redis_prefix)
    names = [f"feature_{number}" for number in range(160)]
    store.put(
        OnlineFeatures(f"P{number}", "simulated", THEN, dict.fromkeys(names, 1.5), feature_set_id(profile))
        for number in range(PATIENTS)
    )
    seconds["feature_store_sensor, all online"], _, data = evaluate("feature_store_sensor", instance, cursor)
    assert "all 300 patients have their features" in data.skip_message  # type: ignore[attr-defined]
    seconds["kafka_consumer_lag_sensor"], _, data = evaluate("kafka_consumer_lag_sensor", instance, cursor)
    assert f"{topic} 600" in data.skip_message  # type: ignore[attr-defined]
    assert f"alert opened [kafka_lag:{topic}]" in caplog.text
    ingest_topics(tables, topic_reader(), {"patient_vitals": topic}, default_trial="simulated")
    caplog.set_level(logging.INFO, logger="clinical_orchestration.alerts")
    _, _, data = evaluate("kafka_consumer_lag_sensor", instance, cursor)
    assert f"{topic} 0" in data.skip_message  # type: ignore[attr-defined]
    assert f"alert resolved [kafka_lag:{topic}]" in caplog.text
    record_property("seconds", {name: round(value, 3) for name, value in seconds.items()})
    # a machine that does other things may be slow; Dagster's limit is far away all the same
    assert max(seconds.values()) < 10
