"""``/metrics``: every family of the mixin with true values after real runs, and nothing untrue without a database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from clinical_orchestration.airflow.control import Control
from clinical_orchestration.alerts.model import Alert, Severity
from clinical_orchestration.alerts.policy import Rules
from clinical_orchestration.page.metrics import Metrics, Rising
from clinical_orchestration.stores.alerts import PostgresAlertStore
from clinical_orchestration_tests.airflow import tiny_definitions

MIXIN = {
    "airflow_dag_processing_import_errors",
    "airflow_dagrun_duration_success",
    "airflow_dagrun_duration_failed",
    "airflow_dagrun_schedule_delay",
    "airflow_ti_failures",
    "airflow_sla_missed",
    "airflow_task_finish",
    "airflow_dag_task_duration",
    "airflow_scheduler_tasks_executable",
    "airflow_scheduler_tasks_starving",
    "airflow_executor_running_tasks",
    "airflow_executor_queued_tasks",
    "airflow_executor_open_slots",
    "airflow_pool_running_slots",
    "airflow_pool_queued_slots",
    "airflow_pool_starving_tasks",
    "airflow_pool_open_slots",
}
DAG, STEP = "model_monitoring", "check_model_performance"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> tuple[set[str], Samples]:
    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    return {family.name for family in families}, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def runs(control: Control) -> None:
    """A run that succeeds, and one with a task that fails, is cleared and succeeds."""
    dag = control.dag(DAG)
    control.trigger(dag, run_id="metrics-good")
    tiny_definitions.failing.add("validate_feature_distribution")
    bad = control.trigger(dag, run_id="metrics-bad")
    tiny_definitions.failing.clear()
    assert bad.state == "failed"
    control.clear(bad)


def read(metrics: Metrics) -> tuple[set[str], Samples]:
    with TestClient(Starlette(routes=[Route("/metrics", metrics.answer)])) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(answer.text)


@pytest.mark.integration
def test_the_mixins_families_are_there_with_true_values(
    control: Control, database: str, runs: None, tmp_path: Path
) -> None:
    names, samples = read(Metrics(lambda: control, database, None))
    assert names >= MIXIN
    finished = {
        state: value(
            samples, "airflow_task_finish_total", dag_id=DAG, task_id="validate_feature_distribution", state=state
        )
        for state in ("success", "failed", "skipped")
    }
    assert finished == {"success": 2, "failed": 1, "skipped": 0}
    labels = {"dag_id": DAG, "task_id": "validate_feature_distribution"}
    assert value(samples, "airflow_ti_failures", **labels) == 1
    assert value(samples, "airflow_dag_task_duration_count", **labels) == 3
    assert value(samples, "airflow_dag_task_duration_sum", **labels) > 0
    assert value(samples, "airflow_dagrun_duration_success_count", dag_id=DAG) == 2
    assert value(samples, "airflow_dagrun_duration_failed_count", dag_id=DAG) == 1
    assert value(samples, "airflow_dagrun_duration_success_sum", dag_id=DAG) > 0
    assert value(samples, "airflow_dag_processing_import_errors") == 0
    assert value(samples, "airflow_pool_open_slots", pool_name="spark_jobs") == 4
    assert value(samples, "airflow_executor_running_tasks") == 0
    assert value(samples, "clinical_runs", pipeline=DAG, state="success") == 2
    assert value(samples, "clinical_database_up") == 1


@pytest.mark.integration
def test_waiting_tasks_starve_when_their_pool_is_full(
    control: Control, database: str, runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = control.run(DAG, "metrics-good")
    control.runs.project()
    # as if one step of a pool of one slot ran, and two were ready
    monkeypatch.setattr(control.runs, "project", lambda *_: 0)
    set_state = sa.text(
        "UPDATE airflow_task_instances SET pool = :pool, state_set = :state WHERE dag_run = :run AND task_id = :task"
    )
    set_final = sa.text("UPDATE airflow_dag_runs SET projected_final = :final WHERE id = :run")
    states = {
        "check_model_performance": "running",
        "detect_data_drift": "scheduled",
        "check_concept_drift": "scheduled",
    }
    pool = control.dag(DAG).tasks["detect_data_drift"].pool
    try:
        with control.runs.engine.begin() as connection:
            connection.execute(set_final, {"final": False, "run": run.id})
            for task, state in states.items():
                values = {"pool": "model_training", "state": state, "run": run.id, "task": task}
                connection.execute(set_state, values)
        _, samples = read(Metrics(lambda: control, database, None))
    finally:
        with control.runs.engine.begin() as connection:
            connection.execute(set_final, {"final": True, "run": run.id})
            for task in states:
                connection.execute(set_state, {"pool": pool, "state": None, "run": run.id, "task": task})
    assert value(samples, "airflow_pool_running_slots", pool_name="model_training") == 1
    assert value(samples, "airflow_pool_open_slots", pool_name="model_training") == 0
    assert value(samples, "airflow_pool_starving_tasks", pool_name="model_training") == 2
    assert value(samples, "airflow_pool_queued_slots", pool_name="model_training") == 0
    assert value(samples, "airflow_scheduler_tasks_starving") == 2
    assert value(samples, "airflow_scheduler_tasks_executable") == 0
    assert value(samples, "airflow_executor_queued_tasks") == 2


@pytest.mark.integration
def test_alerts_services_and_the_queue_are_counted(control: Control, database: str, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    store = PostgresAlertStore(database)
    alert = Alert("metrics-test", Severity.ERROR, "A title", "What", "/where", "Do it", source="test")
    store.raise_alert(alert, datetime.now(UTC), Rules(), [])
    file = tmp_path / "status.json"
    services = [
        {"name": "kafka", "level": 0, "state": "healthy", "latency_ms": 12.5},
        {"name": "spark", "level": 2, "state": "unhealthy"},
    ]
    file.write_text(json.dumps({"services": services}))
    _, samples = read(Metrics(lambda: control, database, file))
    assert value(samples, "clinical_alerts_open", severity="error") == 1
    assert value(samples, "clinical_service_up", service="kafka", level="0") == 1
    assert value(samples, "clinical_service_up", service="spark", level="2") == 0
    assert value(samples, "clinical_service_latency_seconds", service="kafka", level="0") == 0.0125
    assert value(samples, "clinical_run_queue_length") == 0


@pytest.mark.integration
def test_a_deleted_run_makes_no_total_fall(control: Control, database: str, runs: None) -> None:
    metrics = Metrics(lambda: control, database, None)
    control.trigger(control.dag(DAG), run_id="metrics-gone")
    before = value(read(metrics)[1], "airflow_dagrun_duration_success_count", dag_id=DAG)
    control.delete(control.run(DAG, "metrics-gone"))
    after = parsed(metrics.text().decode())[1]
    assert value(after, "airflow_dagrun_duration_success_count", dag_id=DAG) == before


def test_without_a_database_nothing_is_claimed(tmp_path: Path) -> None:
    def broken() -> Any:
        raise ConnectionError("secret text")

    for metrics in (Metrics(lambda: None, "", None), Metrics(broken, "", None)):
        names, samples = read(metrics)
        assert value(samples, "clinical_database_up") == 0
        assert not names & MIXIN
        assert "secret" not in metrics.text().decode()


def test_a_hanging_database_is_answered_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from clinical_orchestration.page import metrics as module

    release = threading.Event()

    def hanging() -> None:
        release.wait(30)

    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.1)
    _, samples = read(Metrics(hanging, "", None))
    release.set()
    assert value(samples, "clinical_database_up") == 0


def test_totals_rise_only() -> None:
    rising = Rising()
    assert [rising("a", number) for number in (3, 5, 4, 4, 6)] == [3, 5, 5, 5, 7]
    assert rising("b", 1) == 1
