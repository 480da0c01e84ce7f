"""The REST API over a real Dagster on PostgreSQL: shapes, filters, errors as Airflow gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.fernet import Fernet
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from clinical_orchestration.airflow.control import Control
from clinical_orchestration.api.app import OPERATIONS, create_api
from clinical_orchestration.contract import PIPELINES
from clinical_orchestration.platform.crypto import Cipher
from clinical_orchestration.platform.store import PlatformStore
from clinical_orchestration_tests.airflow import tiny_definitions

pytestmark = pytest.mark.integration

MAIN = "clinical_data_pipeline"


@pytest.fixture(scope="module")
def api(control: Control, database: str) -> Iterator[TestClient]:
    store = PlatformStore(database, Cipher(Fernet.generate_key().decode()))
    app = Starlette(routes=[Mount("/api/v1", create_api(control, lambda: store))])
    with TestClient(app, raise_server_exceptions=False) as client:
        client.base_url = client.base_url.join("/api/v1/")
        yield client


@pytest.fixture(scope="module")
def finished(api: TestClient) -> str:
    """A run with a failed task that was cleared and succeeded."""
    tiny_definitions.failing.add("train_model")
    answer = api.post(f"dags/{MAIN}/dagRuns", json={"dag_run_id": "api-run", "conf": {"a": 1}, "note": "noted"})
    assert answer.status_code == 200, answer.text
    tiny_definitions.failing.clear()
    answer = api.post(f"dags/{MAIN}/clearTaskInstances", json={"dry_run": False, "dag_run_id": "api-run"})
    assert {one["task_id"] for one in answer.json()["task_instances"]} >= {"train_model", "evaluate_model"}
    return "api-run"


def problem(answer: Any, status: int, title: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert set(body) == {"detail", "status", "title", "type"}
    assert body["status"] == status
    if title is not None:
        assert body["title"] == title
    return body


def test_the_dags_are_the_pipelines_of_the_contract(api: TestClient) -> None:
    body = api.get("dags").json()
    assert body["total_entries"] == len(PIPELINES)
    assert [dag["dag_id"] for dag in body["dags"]] == sorted(pipeline.name for pipeline in PIPELINES)
    dag = next(dag for dag in body["dags"] if dag["dag_id"] == MAIN)
    assert dag["schedule_interval"] == {"__type": "TimeDelta", "days": 0, "seconds": 21600, "microseconds": 0}
    assert dag["owners"] == ["clinical_trials_team"]
    assert {tag["name"] for tag in dag["tags"]} == {"clinical_trials", "mlops", "data_pipeline"}
    weekly = next(dag for dag in body["dags"] if dag["dag_id"] == "scheduled_retraining")
    assert weekly["schedule_interval"]["days"] == 7


def test_dags_are_filtered_ordered_and_paged(api: TestClient) -> None:
    assert api.get("dags", params={"tags": "monitoring"}).json()["total_entries"] == 2
    assert api.get("dags", params={"dag_id_pattern": "BACK%fill"}).json()["total_entries"] == 1
    page = api.get("dags", params={"limit": 2, "offset": 1, "order_by": "-dag_id", "fields": "dag_id"}).json()
    names = sorted((pipeline.name for pipeline in PIPELINES), reverse=True)
    assert page == {"dags": [{"dag_id": names[1]}, {"dag_id": names[2]}], "total_entries": 5}
    problem(api.get("dags", params={"order_by": "owner"}), 400, "Bad Request")
    problem(api.get("dags", params={"colour": "red"}), 400)
    problem(api.get("dags", params={"limit": "many"}), 400)


def test_pausing_and_unpausing(api: TestClient) -> None:
    name = "data_quality_monitoring"
    assert api.patch(f"dags/{name}", json={"is_paused": True}).json()["is_paused"] is True
    assert {dag["dag_id"] for dag in api.get("dags", params={"paused": "true"}).json()["dags"]} >= {name}
    shown = api.get(f"dags/{name}").json()
    assert shown["next_dagrun"] is None
    assert api.patch(f"dags/{name}?update_mask=is_paused", json={"is_paused": False}).json()["is_paused"] is False
    problem(api.patch(f"dags/{name}", json={"description": "x"}), 400)
    problem(api.patch("dags/none", json={"is_paused": True}), 404, "Dag with id: 'none' not found")


def test_tasks_carry_the_edges_of_the_contract(api: TestClient) -> None:
    body = api.get(f"dags/{MAIN}/tasks").json()
    found = {task["task_id"]: task for task in body["tasks"]}
    main = next(pipeline for pipeline in PIPELINES if pipeline.name == MAIN)
    edges = {(name, below) for name, task in found.items() for below in task["downstream_task_ids"]}
    assert edges == set(main.edges)
    assert found["train_model"]["retries"] == 1
    assert found["train_model"]["retry_delay"]["seconds"] == 300
    problem(api.get("dags/none/tasks"), 404, "DAG not found")
    problem(api.get(f"dags/{MAIN}/tasks/none"), 404, "Task not found")
    assert api.get(f"dags/{MAIN}/details").json()["catchup"] is False


def test_a_run_is_shown_with_its_tasks_tries_logs_and_xcoms(api: TestClient, finished: str) -> None:
    base = f"dags/{MAIN}/dagRuns/{finished}"
    run = api.get(base).json()
    assert (run["state"], run["conf"], run["note"], run["run_type"]) == ("success", {"a": 1}, "noted", "manual")
    tasks = api.get(f"{base}/taskInstances").json()
    assert tasks["total_entries"] == 12
    assert {task["state"] for task in tasks["task_instances"]} == {"success"}
    tries = api.get(f"{base}/taskInstances/train_model/tries").json()
    assert [(one["try_number"], one["state"]) for one in tries["task_instances"]] == [(1, "failed"), (2, "success")]
    log = api.get(f"{base}/taskInstances/train_model/logs/1")
    assert log.headers["content-type"].startswith("text/plain")
    assert "made to fail" in log.text
    assert "evaluate_model" not in log.text
    second = api.get(f"{base}/taskInstances/train_model/logs/2", headers={"Accept": "application/json"}).json()
    assert "working on train_model" in second["content"]
    rest = api.get(
        f"{base}/taskInstances/train_model/logs/2",
        params={"token": second["continuation_token"]},
        headers={"Accept": "application/json"},
    ).json()
    assert "working on train_model" not in rest["content"]
    problem(api.get(f"{base}/taskInstances/train_model/logs/2", params={"token": "forged"}), 400)
    xcom = api.get(f"{base}/taskInstances/train_model/xcomEntries/return_value", params={"stringify": "false"}).json()
    assert xcom["value"] == {"rows": 3, "step": "train_model"}
    assert isinstance(
        api.get(f"{base}/taskInstances/train_model/xcomEntries/return_value").json()["value"], str
    )  # fmt: skip
    problem(api.get(f"{base}/taskInstances/none"), 404, "Task instance not found")
    problem(api.get(f"dags/{MAIN}/dagRuns/none"), 404, "DAGRun not found")
    assert api.get("dags/none/dagRuns").json() == {"dag_runs": [], "total_entries": 0}


def test_triggers_are_checked(api: TestClient, finished: str) -> None:
    body = problem(api.post(f"dags/{MAIN}/dagRuns", json={"dag_run_id": finished}), 409, "Conflict")
    assert "already exists" in body["detail"]
    problem(api.post("dags/none/dagRuns", json={}), 404, "DAG not found")
    problem(api.post(f"dags/{MAIN}/dagRuns", json={"logical_date": "yesterday"}), 400)
    problem(api.post(f"dags/{MAIN}/dagRuns", json={"colour": 1}), 400)
    problem(api.post(f"dags/{MAIN}/dagRuns", json={"state": "success"}), 400)
    problem(api.post(f"dags/{MAIN}/dagRuns", content=b"{", headers={"content-type": "application/json"}), 400)


def test_batch_lists(api: TestClient, finished: str) -> None:
    runs = api.post(
        "dags/~/dagRuns/list", json={"dag_ids": [MAIN], "states": ["success"], "page_limit": 5, "order_by": "-id"}
    ).json()
    assert finished in {run["dag_run_id"] for run in runs["dag_runs"]}
    tasks = api.post(
        "dags/~/dagRuns/~/taskInstances/list",
        json={"dag_run_ids": [finished], "task_ids": ["train_model"], "state": ["success"]},
    ).json()
    assert [task["try_number"] for task in tasks["task_instances"]] == [2]
    problem(api.post("dags/~/dagRuns/list", json={"start_date_gte": "2025-01-01T00:00:00"}), 400)
    stats = {one["dag_id"]: one["stats"] for one in api.get("dagStats", params={"dag_ids": MAIN}).json()["dags"]}
    assert {one["state"]: one["count"] for one in stats[MAIN]}["success"] >= 1


def test_variables_and_connections_keep_their_secrets(api: TestClient) -> None:
    assert api.post("variables", json={"key": "threshold", "value": "0.9"}).status_code == 200
    assert api.post("variables", json={"key": "threshold", "value": "0.8"}).json()["value"] == "0.8"
    assert api.get("variables/threshold").json() == {"key": "threshold", "value": "0.8", "description": None}
    api.post("variables", json={"key": "mail_password", "value": "hunter2"})
    assert "hunter2" not in api.get("variables").text
    assert api.delete("variables/threshold").status_code == 204
    problem(api.get("variables/threshold"), 404, "Variable not found")
    made = api.post(
        "connections",
        json={
            "connection_id": "lab",
            "conn_type": "http",
            "host": "h",
            "password": "geheim",
            "extra": '{"token":"x9"}',
        },
    )
    assert made.status_code == 200
    shown = api.get("connections/lab").text
    assert "geheim" not in made.text + shown
    assert "x9" not in shown
    problem(api.post("connections", json={"connection_id": "lab", "conn_type": "http"}), 409, "Conflict")
    assert api.patch("connections/lab?update_mask=port", json={"port": 99, "host": "other"}).json()["host"] == "h"
    problem(api.post("connections/test", json={"connection_id": "lab", "conn_type": "http"}), 403)


def test_pools(api: TestClient) -> None:
    pools = {pool["name"]: pool for pool in api.get("pools").json()["pools"]}
    assert pools["spark_jobs"]["slots"] == 4
    assert "default_pool" in pools
    assert api.post("pools", json={"name": "extra", "slots": 3}).json()["open_slots"] == 3
    problem(api.post("pools", json={"name": "extra", "slots": 3}), 409)
    assert api.patch("pools/extra?update_mask=slots", json={"slots": 5, "name": "extra"}).json()["slots"] == 5
    assert api.delete("pools/extra").status_code == 204
    problem(api.delete("pools/default_pool"), 400)


def test_datasets_are_the_assets(api: TestClient, finished: str) -> None:
    found = api.get("datasets", params={"uri_pattern": "train_model", "dag_ids": MAIN}).json()
    dataset = found["datasets"][0]
    assert dataset["producing_tasks"][0]["task_id"] == "train_model"
    assert api.get(f"datasets/{dataset['uri'].replace('/', '%2F')}").json()["id"] == dataset["id"]
    events = api.get(
        "datasets/events", params={"dataset_id": dataset["id"], "source_run_id": finished, "order_by": "-timestamp"}
    ).json()
    assert events["total_entries"] == 1
    assert events["dataset_events"][0]["source_run_id"] == finished
    reported = api.post("datasets/events", json={"dataset_uri": dataset["uri"], "extra": {"k": "v"}}).json()
    assert reported["source_dag_id"] is None
    problem(api.get(f"dags/{MAIN}/datasets/queuedEvent"), 404, "Queue event not found")


def test_what_the_deployment_is(api: TestClient) -> None:
    assert api.get("version").json()["version"] == "2.11.0"
    sections = {one["name"] for one in api.get("config").json()["sections"]}
    assert {"core", "api", "webserver"} <= sections
    assert "[core]" in api.get("config", headers={"Accept": "text/plain"}).text
    problem(api.get("config", params={"section": "none"}), 404)
    assert api.get("importErrors").json() == {"import_errors": [], "total_entries": 0}
    token = api.get(f"dags/{MAIN}").json()["file_token"]
    assert api.get(f"dagSources/{token}").status_code == 200
    problem(api.get("nowhere"), 404)
    answer = api.put("dags")
    problem(answer, 405)
    assert answer.headers["allow"] == "GET, PATCH"


def test_every_operation_has_its_name_once() -> None:
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)
    assert len({(operation.method, operation.path) for operation in OPERATIONS}) == len(OPERATIONS)


def test_the_list_of_dags_is_never_older_than_a_change(api: TestClient, control: Control, database: str) -> None:
    """It is kept between requests, so whoever pauses a DAG, in whatever process, must make it anew."""
    from clinical_orchestration.airflow.database import open_engine

    name = "scheduled_retraining"

    def shown() -> bool:
        (dag,) = [dag for dag in api.get("dags").json()["dags"] if dag["dag_id"] == name]
        return bool(dag["is_paused"])

    assert shown() is False
    assert api.get("dags").content == api.get("dags").content
    engine = open_engine(database)
    other = Control(control._context, engine)  # as in another process
    other.set_paused(other.dag(name), True)
    assert shown() is True
    other.set_paused(other.dag(name), False)
    engine.dispose()
    assert shown() is False
    assert api.patch(f"dags/{name}", json={"is_paused": True}).status_code == 200
    assert shown() is True
    assert api.patch(f"dags/{name}", json={"is_paused": False}).status_code == 200
    assert shown() is False


def test_the_list_of_dags_is_made_anew_when_a_dag_fires(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime, timedelta

    from clinical_orchestration.api import dags as module

    moment = datetime(2026, 11, 23, 5, 59, tzinfo=UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return moment

    made: list[datetime] = []
    listed = module.DagRoutes._listed

    def counted(self: module.DagRoutes, call: Any) -> dict[str, Any]:
        made.append(moment)
        return listed(self, call)

    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(module.DagRoutes, "_listed", counted)
    for _ in range(2):
        assert api.get("dags", params={"limit": 3}).status_code == 200
    assert len(made) == 1
    moment += timedelta(minutes=1)  # a tick of the main pipeline
    assert api.get("dags", params={"limit": 3}).status_code == 200
    assert len(made) == 2


def test_nul_characters_are_refused(api: TestClient) -> None:
    problem(api.get("dags/a%00b"), 400)
    problem(api.get("dags", params={"dag_id_pattern": "a\x00"}), 400)
    problem(api.post(f"dags/{MAIN}/dagRuns", json={"conf": {"deep": ["a\x00"]}}), 400)
    escaped = api.post("variables", json={"key": "backslash", "value": "\\u0000"})
    assert escaped.json()["value"] == "\\u0000"


@pytest.mark.parametrize("order", ["id", "-execution_date", "start_date", "-end_date", "state", "dag_run_id"])
def test_pages_of_runs_are_complete_in_every_order(api: TestClient, finished: str, order: str) -> None:
    api.post(f"dags/{MAIN}/dagRuns", json={"dag_run_id": "second-run"})
    for query in ({}, {"state": "success"}, {"state": "queued,success,failed,running"}):
        whole = api.get("dags/~/dagRuns", params={**query, "order_by": order}).json()
        names = [run["dag_run_id"] for run in whole["dag_runs"]]
        assert whole["total_entries"] == len(names) >= 2
        pages = [
            api.get("dags/~/dagRuns", params={**query, "order_by": order, "limit": 1, "offset": offset}).json()
            for offset in range(len(names) + 1)
        ]
        assert [run["dag_run_id"] for page in pages for run in page["dag_runs"]] == names
        assert {page["total_entries"] for page in pages} == {len(names)}
