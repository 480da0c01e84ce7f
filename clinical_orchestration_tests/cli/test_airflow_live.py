"""Airflow's commands as people know them, in their order, over a real instance whose runs execute."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster import DagsterInstance
from dagster._daemon.types import DaemonHeartbeat

from clinical_orchestration.audit.trail import AuditTrail
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE, MODEL_MONITORING, PIPELINES
from clinical_orchestration_tests.airflow import tiny_definitions
from clinical_orchestration_tests.airflow.live import VIEWER, Live, live_page
from clinical_orchestration_tests.cli.test_airflow import DEPLOY, Airflow, airflow
from clinical_orchestration_tests.databases import new_database

__all__ = ["airflow"]
pytestmark = pytest.mark.integration

MAIN, MONITORING, QUALITY = "clinical_data_pipeline", "model_monitoring", "data_quality_monitoring"


@pytest.fixture(scope="module")
def live(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A page with tiny definitions; commands use the page's own code server, and nothing else of it."""
    home: Path = tmp_path_factory.mktemp("commands")
    with (
        pytest.MonkeyPatch.context() as patch,
        live_page(new_database(postgres_env["POSTGRES_URL"], "commands"), home) as page,
    ):
        patch.setenv("DAGSTER_HOME", str(home))
        server = page.context.create_request_context().get_code_location("tiny")
        where = {"host": "localhost", "socket": server.socket, "location_name": "tiny"}  # type: ignore[attr-defined]
        (home / "workspace.yaml").write_text(yaml.safe_dump({"load_from": [{"grpc_server": where}]}))
        yield page


def rows(airflow: Airflow, *words: str) -> list[dict[str, str]]:
    """Return what a command shows, as ``--output json`` gives it."""
    answer = airflow(*words, "--output", "json")
    assert answer.status == 0, answer.err
    found: list[dict[str, str]] = json.loads(answer.out)
    return found


def wait_for(airflow: Airflow, dag_id: str, run_id: str, state: str) -> dict[str, str]:
    end = time.monotonic() + 30
    while True:
        run = next(one for one in rows(airflow, "dags", "list-runs", "-d", dag_id) if one["run_id"] == run_id)
        if run["state"] == state:
            return run
        assert time.monotonic() < end, run
        time.sleep(0.2)


def test_the_commands_that_people_know_work_as_written(
    airflow: Airflow, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert airflow("db", "check").out == "Connection successful.\n"
    assert airflow("jobs", "check", "--job-type", "SchedulerJob") == (1, "", "No alive jobs found.\n")
    with DagsterInstance.get() as instance:
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SCHEDULER", "one"))
    assert airflow("jobs", "check", "--job-type", "SchedulerJob").out == "Found one alive job.\n"

    listed = rows(airflow, "dags", "list")
    assert [one["dag_id"] for one in listed] == sorted(pipeline.name for pipeline in PIPELINES)
    assert set(listed[0]) == {"dag_id", "fileloc", "owners", "is_paused"}

    (run,) = rows(airflow, "dags", "trigger", MAIN, "--exec-date", "2025-10-25")
    assert (run["dag_run_id"], run["logical_date"]) == (
        "manual__2025-10-25T00:00:00+00:00", "2025-10-25T00:00:00+00:00",
    )  # fmt: skip
    again = airflow("dags", "trigger", MAIN, "--exec-date", "2025-10-25")
    assert (again.status, "already exists" in again.err) == (1, True)
    (with_conf,) = rows(airflow, "dags", "trigger", MAIN, "--conf", '{"param1": "value1"}')
    assert json.loads(json.dumps(with_conf["conf"])) == {"param1": "value1"}
    wait_for(airflow, MAIN, run["dag_run_id"], "success")
    wait_for(airflow, MAIN, with_conf["dag_run_id"], "success")
    assert {"param1": "value1"} in tiny_definitions.conf_seen
    assert airflow("dags", "state", MAIN, "2025-10-25").out == "success\n"
    states = rows(airflow, "tasks", "states-for-dag-run", MAIN, run["dag_run_id"])
    assert {one["task_id"]: one["state"] for one in states} == dict.fromkeys(CLINICAL_DATA_PIPELINE.tasks, "success")
    assert rows(airflow, "tasks", "states-for-dag-run", MAIN, "2025-10-25") == states
    assert airflow("tasks", "state", MAIN, "train_model", "2025-10-25").out == "success\n"
    assert airflow("tasks", "list", MAIN).out.split() == sorted(CLINICAL_DATA_PIPELINE.tasks)

    assert rows(airflow, "dags", "pause", MONITORING) == [{"dag_id": MONITORING, "is_paused": "True"}]
    assert airflow("dags", "pause", MONITORING).out == "No unpaused DAGs were found\n"
    (waiting,) = rows(airflow, "dags", "trigger", MONITORING, "--run-id", "waits")
    assert waiting["state"] == "queued"
    assert rows(airflow, "dags", "unpause", MONITORING) == [{"dag_id": MONITORING, "is_paused": "False"}]
    wait_for(airflow, MONITORING, "waits", "success")

    shown = airflow("dags", "show", MONITORING).out
    assert shown.startswith(f"digraph {MONITORING} {{")
    assert all(f"{above} -> {below}" in shown for above, below in MODEL_MONITORING.edges)
    assert airflow("dags", "show", MONITORING, "--save", "graph.dot").out == "File graph.dot saved\n"
    assert Path("graph.dot").read_text() == shown
    assert "mutually exclusive" in airflow("dags", "show", MONITORING, "--save", "graph.dot", "--imgcat").err

    tick, after = airflow("dags", "next-execution", MAIN, "-n", "2").out.split()
    assert tick < after
    assert airflow("dags", "next-execution", "feature_backfill").out == "None\n"
    assert rows(airflow, "dags", "details", MAIN)[0]["dag_id"] == MAIN
    assert rows(airflow, "dags", "list-import-errors") == []
    assert rows(airflow, "dags", "report")[0]["dag_num"] == "5"
    jobs = rows(airflow, "dags", "list-jobs", "--limit", "4")
    assert [(job["job_type"], job["state"]) for job in jobs] == [
        ("SchedulerJob", "running"), ("TriggererJob", "failed"), ("DagProcessorJob", "running"),
        ("LocalTaskJob", "success"),
    ]  # fmt: skip
    assert [job["dag_id"] for job in rows(airflow, "dags", "list-jobs", "-d", MONITORING)] == [MONITORING]

    assert airflow("connections", "import", DEPLOY / "connections.yaml").status == 0
    assert airflow("variables", "import", DEPLOY / "variables.yaml").status == 0
    assert airflow("pools", "import", DEPLOY / "pools.yaml").out == "Uploaded 10 pool(s)\n"
    assert airflow("dags", "delete", MONITORING, "-y").out == "Removed 1 record(s)\n"
    assert airflow("version").out == "2.11.0\n"
    assert airflow("info").status == 0
    events = {row.event for row in AuditTrail(live.database).rows()}
    assert {"cli_dag_trigger.done", "cli_dag_pause.done", "cli_pool_import.done", "cli_dag_delete.done"} <= events


def test_a_backfill_runs_each_interval_and_keeps_what_succeeded(airflow: Airflow, live: Live) -> None:
    days = ("-s", "2025-10-25", "-e", "2025-10-25T04:00")
    assert airflow("dags", "backfill", QUALITY).err == "Provide a start_date and/or end_date\n"
    dry = airflow("dags", "backfill", QUALITY, *days, "--dry-run").out
    assert dry.count("Dry run of DAG") == 2
    assert rows(airflow, "dags", "list-runs", "-d", QUALITY) == []
    none = airflow("dags", "backfill", "feature_backfill", "-s", "2025-10-25")
    assert none == (0, "feature_backfill: No run dates were found for the given dates and dag interval.\n", "")

    tiny_definitions.failing.add("detect_anomalies")
    failed = airflow("dags", "backfill", QUALITY, *days)
    assert failed.status == 1
    # what comes before it is Dagster's own log: the launcher of this test executes runs in this very process
    assert failed.err.endswith("1 run(s) of the backfill failed: backfill__2025-10-25T00:00:00+00:00\n")
    assert len(rows(airflow, "dags", "list-runs", "-d", QUALITY)) == 1, "it stops at the first failure"
    refused = airflow("dags", "backfill", QUALITY, *days)
    assert (refused.status, "--rerun-failed-tasks" in refused.err) == (1, True)
    tiny_definitions.failing.clear()
    done = airflow("dags", "backfill", QUALITY, *days, "--rerun-failed-tasks", "-c", '{"a": 1}')
    assert done.status == 0, done.err
    found = {run["run_id"]: run["state"] for run in rows(airflow, "dags", "list-runs", "-d", QUALITY)}
    assert found == {f"backfill__2025-10-25T0{hour}:00:00+00:00": "success" for hour in (0, 4)}
    assert rows(airflow, "dags", "list-runs", "-d", QUALITY, "--no-backfill") == []
    again = airflow("dags", "backfill", QUALITY, *days)
    assert again.out.count("success before") == 2

    airflow("dags", "pause", QUALITY)
    paused = airflow("dags", "backfill", QUALITY, "-s", "2025-10-26")
    assert (paused.status, "airflow dags unpause" in paused.err) == (1, True)
    airflow("dags", "unpause", QUALITY)


def test_one_run_is_tested_with_its_logs(airflow: Airflow, live: Live, tmp_path: Path) -> None:
    passed = airflow("dags", "test", MAIN, "2024-01-01", "-c", '{"a": 2}', "--show-dagrun")
    assert passed.status == 0, passed.err
    assert "working on train_model" in passed.out
    assert 'train_model [color="#000000" fillcolor="green"' in passed.out
    assert {"a": 2} in tiny_definitions.conf_seen
    tiny_definitions.failing.add("train_model")
    picture = tmp_path / "run.dot"
    failed = airflow("dags", "test", MAIN, "2024-01-01", "--save-dagrun", picture)
    assert failed.status == 1
    assert failed.err.endswith("DagRun failed\n")
    assert "made to fail" in failed.out
    assert 'train_model [color="#000000" fillcolor="red"' in picture.read_text()
    tiny_definitions.failing.clear()

    only = airflow("tasks", "clear", MAIN, "-t", "^train_model$", "-d", "-s", "2024-01-01", "-e", "2024-01-01", "-y")
    assert (only.status, "train_model" in only.out, "extract_features" in only.out) == (0, True, False), only.err
    wait_for(airflow, MAIN, "manual__2024-01-01T00:00:00+00:00", "success")


@pytest.mark.parametrize(
    "words", [["nonsense"], ["dags", "nonsense"], ["dags", "trigger"], ["dags", "trigger", "a", "--conf", "{"],
              ["dags", "next-execution", "a", "-n", "0"], ["dags", "list", "--output", "xml"]]
)  # fmt: skip
def test_what_airflow_would_not_understand_is_not_understood(airflow: Airflow, words: list[str]) -> None:
    answer = airflow(*words)
    assert answer.status == 2
    assert answer.out.startswith("usage: airflow")
    assert "command error: " in answer.err
    assert answer.err.endswith(", see help above.\n")


def test_a_viewer_looks_and_changes_nothing(airflow: Airflow, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, password = VIEWER.partition(":")
    monkeypatch.setenv("CLINICAL_USER", name)
    monkeypatch.setenv("CLINICAL_PASSWORD", password)
    assert len(rows(airflow, "dags", "list")) == len(PIPELINES)
    for words in (
        ("dags", "trigger", MAIN), ("dags", "pause", MAIN), ("dags", "delete", MAIN, "-y"), ("dags", "test", MAIN),
        ("dags", "backfill", MAIN, "-s", "2025-01-01"), ("tasks", "clear", MAIN, "-y"),
        ("variables", "set", "a", "b"), ("connections", "delete", "a"), ("pools", "set", "a", "1", "b"),
    ):  # fmt: skip
        answer = airflow(*words)
        assert (answer.status, "may not do this" in answer.err) == (1, True), words
    assert os.environ["CLINICAL_USER"] == name
