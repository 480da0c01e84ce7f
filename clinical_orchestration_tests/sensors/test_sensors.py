"""The sensors on stores in memory, and with every service absent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from clinical_orchestration.alerts.model import Severity
from clinical_orchestration.defs.results import materialized
from clinical_orchestration.defs.sensors import SENSORS, observe
from clinical_orchestration.defs.sensors import sensors as module
from clinical_orchestration.defs.sensors.requests import Cursor, Patience
from clinical_orchestration.features.definitions import feature_set_id
from clinical_orchestration.ingestion.kafka import ingest_topics
from clinical_orchestration.resources import build_resources
from clinical_orchestration.settings import Variables
from clinical_orchestration.stores.kafka import Record
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineFeatures
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS, FEATURES, MODEL_PERFORMANCE, arrow_schema, bronze
from clinical_orchestration.tables import MODEL_PERFORMANCE_COLUMNS as PERFORMANCE_COLUMNS
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import vitals_message
from clinical_orchestration_tests.fakes import InMemoryObjects, InMemoryTableStore, RecordingNotifier
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

CURSOR = Cursor("2026-03-01").dumps()
THEN = datetime(2025, 1, 10, 12, tzinfo=UTC)
TOPIC = "patient-vitals"


class Broker:
    """A `KafkaResource` over a log in memory."""

    def __init__(self, log: FakeKafka | None) -> None:
        self.log = log

    def available(self) -> bool:
        return self.log is not None

    def reader(self) -> Any:
        return self.log

    def admin(self) -> Any:
        return self.log


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def evaluate(
    sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str = CURSOR, **resources: Any
) -> dg.SensorResult | dg.SkipReason:
    context = dg.build_sensor_context(instance=instance, cursor=cursor, sensor_name=sensor.name)
    raw = sensor._raw_fn  # called directly: stores in memory are no configurable resources
    return raw(context, **resources)  # type: ignore[no-any-return]


def request(result: Any) -> dg.RunRequest:
    (found,) = result.run_requests or []
    assert isinstance(found, dg.RunRequest)
    return found


def skipped(result: Any) -> str:
    if isinstance(result, dg.SkipReason):
        return str(result.skip_message)
    assert not result.run_requests
    return str(result.skip_reason.skip_message)


def by_name(name: str) -> dg.SensorDefinition:
    return next(sensor for sensor in SENSORS if sensor.name == name)


def materialize(instance: dg.DagsterInstance, key: str, trial: str, result: dict[str, Any]) -> None:
    """Store a result as a step does."""

    @dg.asset(key=key.split("/"))
    def made() -> dg.MaterializeResult:  # type: ignore[type-arg]
        return materialized(dg.AssetKey(key.split("/")), trial, result)

    assert dg.materialize([made], instance=instance).success


@pytest.fixture
def broker() -> Broker:
    log = FakeKafka()
    log.ensure_topics(Variables().topics().values(), partitions=2)
    return Broker(log)


def produce(broker: Broker, count: int) -> None:
    assert broker.log is not None
    broker.log.send([Record(TOPIC, json.dumps(vitals_message(number)).encode()) for number in range(count)])


def ingest(tables: InMemoryTableStore, log: FakeKafka) -> None:
    ingest_topics(
        tables, log, Variables().topics(), admin=log, default_trial="simulated", group="test", now=datetime.now(UTC)
    )


def test_every_sensor_runs_from_the_start_and_says_what_it_does() -> None:
    assert {sensor.name for sensor in SENSORS} >= {
        "clinical_data_sensor", "landing_files_sensor", "feature_store_sensor", "kafka_consumer_lag_sensor",
        "alert_delivery_sensor", "run_failure_alerts", "run_success_alerts",
    }  # fmt: skip
    for sensor in SENSORS:
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING, sensor.name
        assert sensor.description, sensor.name
        assert 30 <= (sensor.minimum_interval_seconds or 0) <= 60, sensor.name


def test_messages_start_the_pipeline_once(
    instance: dg.DagsterInstance, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_VAR_CLINICAL_DATA_MINIMUM_RECORDS", "10")
    tables = InMemoryTableStore()
    sensor = module.clinical_data_sensor
    produce(broker, 9)
    assert "9 new records, a run needs 10" in skipped(evaluate(sensor, instance, tables=tables, kafka=broker))
    produce(broker, 1)
    result = evaluate(sensor, instance, tables=tables, kafka=broker)
    assert "10 new records" in request(result).tags["clinical/reason"]
    cursor = result.cursor  # type: ignore[union-attr]
    assert cursor is not None
    assert "0 new records" in skipped(evaluate(sensor, instance, cursor, tables=tables, kafka=broker))
    assert broker.log is not None
    ingest(tables, broker.log)
    produce(broker, 4)
    assert "4 new records" in skipped(evaluate(sensor, instance, cursor, tables=tables, kafka=broker))


def test_bad_quality_holds_the_pipeline_back(
    instance: dg.DagsterInstance, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_VAR_CLINICAL_DATA_MINIMUM_RECORDS", "1")
    monkeypatch.setenv("CLINICAL_TRIAL", "simulated")
    produce(broker, 5)
    materialize(instance, observe.CLINICAL_DATA_QUALITY, "simulated", {"scores": {"a": 0.99, "b": 0.5}})
    materialize(instance, observe.CLINICAL_DATA_QUALITY, "cdisc-pilot", {"scores": {"a": 1.0}})
    tables = InMemoryTableStore()
    sensor = module.clinical_data_sensor
    assert "score 0.500 is below" in skipped(evaluate(sensor, instance, tables=tables, kafka=broker))
    materialize(instance, observe.QUALITY_REPORT, "simulated", {"lowest": 0.97, "scores": {}})
    request(evaluate(sensor, instance, tables=tables, kafka=broker))


def test_files_start_the_pipeline_on_their_folder(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    folder = tmp_path / "landing" / "cdisc-pilot"
    folder.mkdir(parents=True)
    sensor, objects = module.landing_files_sensor, InMemoryObjects()
    assert "no file" in skipped(evaluate(sensor, instance, objects=objects))
    (folder / "vs.csv").write_text("a\n1\n")
    (folder / "notes.txt").write_text("not looked at")
    first = evaluate(sensor, instance, objects=objects)
    assert "1 of cdisc-pilot" in skipped(first)
    second = evaluate(sensor, instance, first.cursor, objects=objects)  # type: ignore[union-attr, arg-type]
    config = request(second).run_config["resources"]["pipeline"]["config"]
    assert (config["trial"], config["source"]) == ("cdisc-pilot", str(folder))
    assert skipped(evaluate(sensor, instance, second.cursor, objects=objects)) == "no new file"  # type: ignore[union-attr, arg-type]


def test_files_in_the_bucket_start_the_pipeline_on_their_prefix(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    objects = InMemoryObjects()
    objects.put("landing/simulated/vs.csv", b"a\n1\n")
    objects.put("landing/nobody/vs.csv", b"a\n1\n")
    assert "1 of simulated" in skipped(evaluate(module.landing_files_sensor, instance, objects=objects))
    objects.put("landing/simulated/_SUCCESS", b"")
    found = request(evaluate(module.landing_files_sensor, instance, objects=objects))
    config = found.run_config["resources"]["pipeline"]["config"]
    assert (config["trial"], config["source"]) == ("simulated", objects.uri("landing/simulated/"))


def features_of(tables: InMemoryTableStore, patients: int) -> None:
    rows = [
        {"trial": "simulated", "patient_id": f"P{number}", "feature_time": THEN, "feature_date": THEN.date()}
        for number in range(patients)
    ]
    tables.append(FEATURES, pa.Table.from_pylist(rows, schema=arrow_schema(FEATURE_KEY_COLUMNS)))


def test_lost_online_features_start_the_pipeline(instance: dg.DagsterInstance) -> None:
    tables, online = InMemoryTableStore(), InMemoryOnlineStore()
    sensor = module.feature_store_sensor
    assert "no trial has records" in skipped(evaluate(sensor, instance, tables=tables, online=online))
    features_of(tables, 3)
    result = evaluate(sensor, instance, tables=tables, online=online)
    found = request(result)
    assert found.run_config["resources"]["pipeline"]["config"]["trial"] == "simulated"
    assert "3 without online features of 3 patients" in found.tags["clinical/reason"]
    assert "P1" not in json.dumps([found.tags, found.run_config, result.cursor])  # type: ignore[union-attr]
    feature_set = feature_set_id(load_trial("simulated"))
    online.put(OnlineFeatures(f"P{number}", "simulated", THEN, {"heart_rate": 1.0}, feature_set) for number in range(3))
    assert "all 3 patients have their features" in skipped(evaluate(sensor, instance, tables=tables, online=online))


def test_drift_and_a_falling_performance_ask_for_retraining(instance: dg.DagsterInstance) -> None:
    sensor, tables = by_name("model_performance_sensor"), InMemoryTableStore()
    assert "model_monitoring makes them" in skipped(evaluate(sensor, instance, tables=tables))
    good = {"status": "ok", "auroc": {"value": 0.9}, "baseline": {"auroc": 0.9}, "drop": 0.0}
    materialize(instance, observe.PERFORMANCE, "simulated", good)
    fine = evaluate(sensor, instance, tables=tables)
    assert skipped(fine) == "simulated: the model is fine"
    rows = [
        {
            **dict.fromkeys(PERFORMANCE_COLUMNS), "trial": "simulated", "run_id": "r", "computed_at": THEN,
            "span": "window", "attribute": "all", "window_end": THEN + timedelta(days=number),
            "auroc": 0.9 - 0.03 * number,
        }
        for number in range(6)
    ]  # fmt: skip
    tables.append(MODEL_PERFORMANCE, pa.Table.from_pylist(rows, schema=arrow_schema(PERFORMANCE_COLUMNS)))
    materialize(instance, observe.DATA_DRIFT, "simulated", {"status": "drift", "drifted_features": ["x"]})
    result = evaluate(sensor, instance, fine.cursor, tables=tables)  # type: ignore[union-attr, arg-type]
    config = request(result).run_config["resources"]["pipeline"]["config"]
    assert config["trial"] == "simulated"
    assert "AUROC fell by 0.150" in config["conf"]["reason"]
    assert "data drift in 1 features" in config["conf"]["reason"]
    again = evaluate(sensor, instance, result.cursor, tables=tables)  # type: ignore[union-attr, arg-type]
    assert "no new monitoring result" in skipped(again)


def test_lag_raises_an_alert_and_its_end_resolves_it(
    instance: dg.DagsterInstance, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINICAL_VAR_KAFKA_LAG_ALERT_MESSAGES", "10")
    tables, alerts = InMemoryTableStore(), RecordingNotifier()
    produce(broker, 11)
    said = skipped(evaluate(module.kafka_consumer_lag_sensor, instance, tables=tables, kafka=broker, alerts=alerts))
    assert "patient-vitals 11" in said
    (alert,) = alerts.sent
    assert (alert.key, alert.severity) == (f"kafka_lag:{TOPIC}", Severity.WARNING)
    assert "11 messages" in alert.what
    assert f"kafka_lag:{TOPIC}" not in alerts.resolved
    assert broker.log is not None
    ingest(tables, broker.log)
    evaluate(module.kafka_consumer_lag_sensor, instance, tables=tables, kafka=broker, alerts=alerts)
    assert f"kafka_lag:{TOPIC}" in alerts.resolved
    assert len(alerts.sent) == 1
    assert tables.row_count(bronze("patient_vitals")) == 11


def test_without_a_broker_the_lag_is_not_guessed(instance: dg.DagsterInstance) -> None:
    alerts = RecordingNotifier()
    said = skipped(
        evaluate(
            module.kafka_consumer_lag_sensor, instance, tables=InMemoryTableStore(), kafka=Broker(None), alerts=alerts
        )
    )
    assert "no Kafka broker is installed" in said
    assert (alerts.sent, alerts.resolved) == ([], [])


@contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in vars(module):
        if name.endswith("_patience"):
            monkeypatch.setattr(module, name, Patience(1.5))
    yield


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("clinical_data_sensor", ("Kafka", "S3")),
        ("landing_files_sensor", ("S3",)),
        ("feature_store_sensor", ("S3",)),
        ("kafka_consumer_lag_sensor", ("Kafka",)),
        ("alert_delivery_sensor", ("no channel",)),
    ],
)
def test_with_every_service_absent_a_sensor_is_quiet_in_time_and_names_what_is_missing(
    name: str, names: tuple[str, ...], instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    began = time.monotonic()
    with impatient(monkeypatch):
        context = dg.build_sensor_context(
            instance=instance, cursor=CURSOR, sensor_name=name, resources=build_resources()
        )
        data = by_name(name).evaluate_tick(context)
    assert time.monotonic() - began < 10
    assert not data.run_requests
    assert data.skip_message is not None
    assert any(part in data.skip_message for part in names), data.skip_message
