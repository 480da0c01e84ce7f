"""The page as others see it: Airflow's official client, dagster-airlift and schemathesis against it, over real runs.

`CLINICAL_WRITE_OPERATIONS=1` writes the table of operations, `docs/airflow-operations.md`, from what the client saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.api.app import OPERATIONS
from clinical_orchestration.contract import MODEL_MONITORING, PIPELINES
from clinical_orchestration_tests.airflow.environments import (
    AIRLIFT,
    OFFICIAL,
    SCHEMATHESIS,
    airflow_document,
    environment,
)
from clinical_orchestration_tests.airflow.live import ADMIN, ROOT, VIEWER, Live, ThreadLauncher, live_page
from clinical_orchestration_tests.airflow.operations_table import TABLE, parsed, written
from clinical_orchestration_tests.databases import new_database

SCRIPTS = Path(__file__).parent / "clients"


def run(python: Path, script: str, *arguments: str, seconds: int = 280, **variables: str) -> Any:
    """Run a script of an environment; return the JSON that it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(python), str(SCRIPTS / script), *arguments],
        capture_output=True, text=True, timeout=seconds, check=False, env={**kept, "ADMIN": ADMIN, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture
def live(postgres_env: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Live]:
    """A page with nothing in it yet, for one test."""
    database = new_database(postgres_env["POSTGRES_URL"], request.node.name.lower()[:40])
    with live_page(database, tmp_path, broken=True) as page:
        yield page


@pytest.mark.integration
@pytest.mark.clients
def test_the_official_client_drives_every_operation(live: Live) -> None:
    report = run(environment(*OFFICIAL), "official.py", live.url, VIEWER=VIEWER)
    assert report["failures"] == []
    answers: dict[str, Mapping[str, int]] = {one["name"]: one["answers"] for one in report["operations"]}
    assert len(answers) == 89
    table = written(report["operations"])
    if os.environ.get("CLINICAL_WRITE_OPERATIONS"):
        TABLE.write_text(table, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table, "the table of operations is not what the client saw"
    assert all(any(int(status) < 500 for status in seen) for seen in answers.values())


@pytest.mark.integration
@pytest.mark.clients
def test_airlift_takes_it_for_an_airflow(live: Live) -> None:
    found = run(environment(*AIRLIFT), "airlift.py", live.url)
    assert found["dags"] == sorted(pipeline.name for pipeline in PIPELINES)
    assert found["tasks"] == sorted(MODEL_MONITORING.tasks)
    assert sorted(found["downstream"]) == sorted(b for a, b in MODEL_MONITORING.edges if a == "start_monitoring")
    assert found["state"] == found["task_state"] == "success"
    assert found["run"].startswith("manual__")
    assert found["batch"] == found["listed"] == [found["run"]]
    assert found["batch_total"] == 1
    assert found["task_batch"] == sorted(MODEL_MONITORING.tasks)
    assert found["task_range"] == len(MODEL_MONITORING.tasks)
    assert "def work(" in found["source"]
    assert "working on detect_data_drift" in found["log"]
    assert any("detect_data_drift" in uri for uri in found["datasets"])
    assert found["left"] == []


@pytest.mark.integration
@pytest.mark.clients
@pytest.mark.slow
def test_no_operation_answers_what_the_document_does_not_know(live: Live) -> None:
    python, document = environment(*SCHEMATHESIS), airflow_document()
    known = seeded(live)
    ThreadLauncher.executing = False
    try:
        report = run(python, "fuzz.py", live.url, str(document), "20261123", seconds=580, KNOWN=json.dumps(known))
    finally:
        ThreadLauncher.executing = True
    assert len(report["operations"]) == 89
    failing = {name: failures for name, failures in report["operations"].items() if failures}
    said = "\n\n".join(f"{name}: {failures[0]}" for name, failures in failing.items())
    assert not failing, f"{89 - len(failing)} of 89 operations pass\n\n{said}"
    assert set(report["tried"]) >= set(report["operations"])


def seeded(live: Live) -> dict[str, list[Any]]:
    """Put something of everything into the page; return the names for the paths."""
    import httpx

    name, _, password = ADMIN.partition(":")
    dag = "model_monitoring"
    with httpx.Client(base_url=f"{live.url}/api/v1", auth=(name, password), timeout=30) as client:

        def post(path: str, **values: Any) -> Any:
            answer = client.post(path, json=values)
            assert answer.status_code == 200, answer.text
            return answer.json()

        for number in range(3):
            post(
                f"dags/{dag}/dagRuns", dag_run_id=f"seed-{number}", conf={"fail": "detect_data_drift"} if number else {}
            )
        post("variables", key="seed", value="1")
        post("connections", connection_id="seed", conn_type="http")
        post("pools", name="seed", slots=3)
        post("roles", name="Seed", actions=[])
        post(
            "users", username="seed", password="a-long-password-1", email="s@example.org", first_name="S", last_name="E"
        )
        end, states = time.monotonic() + 90, set()
        while states != {"success", "failed"}:
            assert time.monotonic() < end, states
            time.sleep(0.2)
            states = {one["state"] for one in client.get(f"dags/{dag}/dagRuns").json()["dag_runs"]}
        uri = client.get("datasets", params={"dag_ids": dag}).json()["datasets"][0]["uri"]
        token = client.get(f"dags/{dag}").json()["file_token"]
    return {
        "dag_id": [dag, "~"],
        "dag_run_id": ["seed-0", "seed-1", "~"],
        "task_id": ["detect_data_drift", "start_monitoring"],
        "map_index": [-1],
        "task_try_number": [1],
        "xcom_key": ["return_value"],
        "uri": [uri],
        "file_token": [token],
        "variable_key": ["seed"],
        "connection_id": ["seed"],
        "pool_name": ["seed", "default_pool"],
        "role_name": ["Seed", "Viewer"],
        "username": ["seed"],
        "event_log_id": [1],
        "import_error_id": [1],
        "section": ["core"],
        "option": ["executor"],
    }


def test_the_table_of_operations_is_that_of_the_api() -> None:
    rows = parsed(TABLE.read_text(encoding="utf-8"))
    assert len(rows) == 89
    ours = {(operation.name, operation.method, operation.path.replace(":path}", "}")) for operation in OPERATIONS}
    ours.add(("get_health", "GET", "/health"))  # the page's own
    assert {(row.name, row.method, row.path) for row in rows} == ours
    assert {row.status for row in rows} == {"done"}


def test_the_scripts_are_no_part_of_the_package() -> None:
    assert SCRIPTS.is_relative_to(ROOT / "clinical_orchestration_tests")
