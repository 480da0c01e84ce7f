"""Changes through the REST API, into the audit trail and out of it as event logs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.testclient import TestClient

from clinical_orchestration.airflow.control import Control
from clinical_orchestration.api.app import OPERATIONS, create_api
from clinical_orchestration.api.problems import Problem
from clinical_orchestration.api.recording import changes
from clinical_orchestration.audit.anchor import Anchor
from clinical_orchestration.audit.trail import AuditEntry, AuditError, AuditTrail
from clinical_orchestration.platform.crypto import Cipher
from clinical_orchestration.platform.store import PlatformStore

pytestmark = pytest.mark.integration

DAG = "model_monitoring"
KEY = Fernet.generate_key().decode()


class Gate:
    """Lets in who names itself; a guest may not change anything."""

    def enter(self, request: Request, permissions: tuple[tuple[str, str], ...]) -> str:
        name = request.headers.get("x-user", "")
        if not name:
            raise Problem(401)
        if name == "guest" and any(action != "can_read" for action, _ in permissions):
            raise Problem(403)
        return name


class Breakable(AuditTrail):
    """A trail that can be broken."""

    broken = False

    def record(self, entry: AuditEntry) -> int:
        if self.broken:
            raise AuditError("no database")
        return super().record(entry)


@pytest.fixture(scope="module")
def trail(database: str, tmp_path_factory: pytest.TempPathFactory) -> Breakable:
    return Breakable(database, KEY, Anchor(tmp_path_factory.mktemp("home") / "head.jsonl"))


@pytest.fixture(scope="module")
def api(control: Control, database: str, trail: Breakable) -> Iterator[TestClient]:
    store = PlatformStore(database, Cipher(KEY))
    app = Starlette(routes=[Mount("/api/v1", create_api(control, lambda: store, gate=Gate(), trail=trail))])
    with TestClient(app, raise_server_exceptions=False, headers={"x-user": "ada"}) as client:
        client.base_url = client.base_url.join("/api/v1/")
        yield client


def newest(api: TestClient, count: int) -> list[dict[str, Any]]:
    """Return the newest event logs, oldest first, their extra parsed."""
    answer = api.get("eventLogs", params={"order_by": "-event_log_id", "limit": count})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["event_logs"][::-1]
    return [{**one, "extra": json.loads(one["extra"])} for one in found]


def test_a_pause_is_recorded_with_the_old_value(api: TestClient) -> None:
    answer = api.patch(f"dags/{DAG}", json={"is_paused": True}, headers={"X-Requested-With": "page"})
    assert answer.status_code == 200, answer.text
    api.patch(f"dags/{DAG}", json={"is_paused": False})
    begun, done, again, _ = newest(api, 4)
    assert (begun["event"], begun["dag_id"], begun["owner"]) == ("patch_dag", DAG, "ada")
    assert begun["extra"]["origin"] == "page"
    assert begun["extra"]["address"] == "testclient"
    assert begun["extra"]["new"] == {"is_paused": True}
    assert (done["event"], done["extra"]["details"]["begun"]) == ("patch_dag.done", begun["event_log_id"])
    assert (again["extra"]["origin"], again["extra"]["old"]) == ("api", {"is_paused": True})


def test_a_trigger_is_recorded_with_the_run_that_it_made(api: TestClient) -> None:
    answer = api.post(f"dags/{DAG}/dagRuns", json={"conf": {"api_key": "tiger", "a": 1}})
    assert answer.status_code == 200, answer.text
    run = answer.json()["dag_run_id"]
    begun, done = newest(api, 2)
    assert (begun["event"], begun["run_id"], begun["extra"]["new"]["conf"]) == (
        "post_dag_run", None, {"api_key": "***", "a": 1},
    )  # fmt: skip
    assert (done["event"], done["run_id"], done["dag_id"]) == ("post_dag_run.done", run, DAG)
    api.patch(f"dags/{DAG}/dagRuns/{run}/setNote", json={"note": "seen"})
    assert newest(api, 2)[0]["extra"]["old"] == {"note": None}
    assert api.delete(f"dags/{DAG}/dagRuns/{run}").status_code == 204
    deleted = newest(api, 2)[0]
    assert (deleted["event"], deleted["run_id"], deleted["extra"]["old"]["note"]) == ("delete_dag_run", run, "seen")


def test_no_secret_of_a_connection_or_variable_lands_in_the_trail(api: TestClient, trail: Breakable) -> None:
    secrets = {"password": "tiger-1", "extra": '{"any": "tiger-2", "token": "tiger-3"}'}
    body = {"connection_id": "audited", "conn_type": "http", "host": "h", **secrets}
    assert api.post("connections", json=body).status_code == 200
    patched = {"connection_id": "audited", "conn_type": "http", "host": "h2", "password": "tiger-4"}
    assert api.patch("connections/audited", json=patched).status_code == 200
    begun = newest(api, 2)[0]
    assert begun["event"] == "connection.edit"
    assert begun["extra"]["old"]["host"] == "h"
    assert begun["extra"]["new"]["host"] == "h2"
    assert begun["extra"]["new"]["password"] == "***"
    assert begun["extra"]["details"]["path"] == {"connection_id": "audited"}
    assert api.patch("connections/audited", json={**patched, "password": ["tiger-5"]}).status_code == 400
    assert newest(api, 1)[0]["event"] == "connection.edit.failed"
    assert newest(api, 1)[0]["extra"]["details"]["error"] == "status 400"
    assert api.delete("connections/audited").status_code == 204
    for value in ("tiger-6", "tiger-7"):
        assert api.post("variables", json={"key": "my_password", "value": value}).status_code == 200
    assert api.post("variables", json={"key": "plain", "value": "1"}).status_code == 200
    assert api.patch("variables/plain", json={"key": "plain", "value": "2"}).status_code == 200
    begun = newest(api, 2)[0]
    assert (begun["event"], begun["extra"]["old"]["value"], begun["extra"]["new"]["value"]) == (
        "variable.edit",
        "1",
        "2",
    )
    stored = "".join(str(vars(row)) for row in trail.rows())
    assert "tiger" not in stored
    assert "my_password" in stored


def test_pools_are_recorded_with_their_old_value(api: TestClient) -> None:
    pool = {"name": "audited", "slots": 2, "description": "d", "include_deferred": False}
    api.post("pools", json=pool)
    api.patch("pools/audited", json={**pool, "slots": 3})
    begun = newest(api, 2)[0]
    assert (begun["event"], begun["extra"]["old"], begun["extra"]["new"]["slots"]) == ("patch_pool", pool, 3)
    api.delete("pools/audited")
    assert newest(api, 2)[0]["extra"]["old"]["slots"] == 3


def test_what_is_refused_is_one_row(api: TestClient) -> None:
    assert api.delete(f"dags/{DAG}", headers={"x-user": "guest"}).status_code == 403
    (refused,) = newest(api, 1)
    assert (refused["event"], refused["dag_id"], refused["extra"]["details"]["status"]) == (
        "delete_dag.refused", DAG, 403,
    )  # fmt: skip
    assert api.delete(f"dags/{DAG}", headers={"x-user": ""}).status_code == 401
    (refused,) = newest(api, 1)
    assert (refused["event"], refused["owner"]) == ("delete_dag.refused", "anonymous")
    assert api.get(f"dags/{DAG}", headers={"x-user": ""}).status_code == 401
    assert newest(api, 1) == [refused], "reading is not recorded"


def test_what_failed_is_recorded_as_failed(api: TestClient) -> None:
    assert api.patch("dags/none", json={"is_paused": True}).status_code == 404
    begun, failed = newest(api, 2)
    assert (begun["event"], failed["event"], failed["dag_id"]) == ("patch_dag", "patch_dag.failed", "none")


def test_lists_that_are_asked_by_post_are_not_recorded(api: TestClient) -> None:
    before = newest(api, 1)
    assert api.post("dags/~/dagRuns/list", json={}).status_code == 200
    assert newest(api, 1) == before
    assert {one.name for one in OPERATIONS if one.method != "GET" and not changes(one)} == {
        "get_dag_runs_batch", "get_task_instances_batch",
    }  # fmt: skip


def test_what_cannot_be_recorded_is_not_done(api: TestClient, trail: Breakable) -> None:
    trail.broken = True
    try:
        answer = api.post("variables", json={"key": "unrecorded", "value": "1"})
    finally:
        trail.broken = False
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert api.get("variables/unrecorded").status_code == 404


def test_event_logs_have_airflows_shape_and_filters(api: TestClient) -> None:
    api.patch(f"dags/{DAG}", json={"is_paused": True})
    body = api.get("eventLogs", params={"limit": 1}).json()
    assert set(body) == {"event_logs", "total_entries"}
    assert body["total_entries"] > 1
    (one,) = body["event_logs"]
    assert set(one) == {
        "event_log_id", "when", "dag_id", "task_id", "run_id", "map_index", "try_number", "event", "execution_date",
        "owner", "extra",
    }  # fmt: skip
    assert (one["event_log_id"], one["when"][-6:], one["execution_date"]) == (1, "+00:00", None)
    assert api.get("eventLogs/1").json() == one
    for wrong in ("9999999", "x", "-1", "99999999999999999999"):
        answer = api.get(f"eventLogs/{wrong}")
        assert (answer.status_code, answer.json()["title"]) == (404, "Event Log not found")

    def events(**params: Any) -> set[str]:
        answer = api.get("eventLogs", params={"limit": 100, **params})
        assert answer.status_code == 200, answer.text
        return {one["event"] for one in answer.json()["event_logs"]}

    every = events()
    assert events(event="patch_dag") == {"patch_dag"}
    assert events(included_events="patch_dag,patch_pool") <= {"patch_dag", "patch_pool"}
    assert events(excluded_events="patch_dag") == every - {"patch_dag"}
    assert events(owner="nobody") == events(dag_id="none", run_id="x") == events(map_index=3) == set()
    assert events(before=one["when"]) == set()
    assert events(after="2020-01-01T00:00:00Z") == every
    ordered = [log["owner"] for log in api.get("eventLogs", params={"order_by": "-owner"}).json()["event_logs"]]
    assert ordered == sorted(ordered, reverse=True)
    assert api.get("eventLogs", params={"order_by": "hash"}).status_code == 400
    assert api.get("eventLogs", params={"who": "x"}).status_code == 400
    assert api.get("eventLogs", params={"after": "never"}).status_code == 400


def test_the_trail_that_the_api_left_is_unbroken(api: TestClient, trail: Breakable, tmp_path: Path) -> None:
    api.patch(f"dags/{DAG}", json={"is_paused": False})
    report = trail.verify()
    assert report.ok, report.verdict.finding
    assert report.verdict.rows == report.verdict.signed == report.verdict.anchored
