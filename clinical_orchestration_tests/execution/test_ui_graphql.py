"""What people do in the Dagster UI with runs that start at once: through its GraphQL, as the page serves it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from clinical_orchestration.execution import compute_logs, coordinator
from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.warm_world import World, wait_for, warm_world
from clinical_orchestration_tests.page.support import EverybodyIs

pytestmark = pytest.mark.integration
JOBS = ("forked", "in_process")

# the operations of the UI's own client: launchpad, run page
LAUNCH = """
mutation LaunchPipelineExecution($p: ExecutionParams!) { launched: launchPipelineExecution(executionParams: $p) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } ... on Error { message } } }
"""
LAUNCH_RUN = LAUNCH.replace("launchPipelineExecution(", "launchRun(")
AGAIN = """
mutation LaunchPipelineReexecution($p: ReexecutionParams!) { launched: launchRunReexecution(reexecutionParams: $p) {
  __typename ... on LaunchRunSuccess { run { runId parentRunId rootRunId } } ... on PythonError { message }
  ... on Error { message } } }
"""
TERMINATE = """
mutation Terminate($run: String!) { terminateRun(runId: $run, terminatePolicy: SAFE_TERMINATE) { __typename
  ... on TerminateRunSuccess { run { status } } ... on Error { message } } }
"""
STATUS = "query($run: ID!) { runOrError(runId: $run) { ... on Run { status canTerminate } } }"
EVENTS = """
query($run: ID!, $cursor: String) { logsForRun(runId: $run, afterCursor: $cursor) { ... on EventConnection {
  cursor hasMore events { __typename ... on MessageEvent { message stepKey eventType }
  ... on LogsCapturedEvent { fileKey stepKeys } } } } }
"""
OUTPUT = (
    "query($key: [String!]!, $cursor: String) { capturedLogs(logKey: $key, cursor: $cursor) { stdout stderr cursor } }"
)
FOLLOW = """
subscription($run: ID!) { pipelineRunLogs(runId: $run) { __typename
  ... on PipelineRunLogsSubscriptionSuccess { hasMorePastEvents messages { ... on MessageEvent {
    message stepKey eventType } } } ... on PipelineRunLogsSubscriptionFailure { message } } }
"""


@dataclass
class Ui:
    """The Dagster UI of the page, as its client in the browser sees it."""

    client: TestClient
    world: World

    def ask(self, query: str, **variables: Any) -> Any:
        """Ask, and return the one answer."""
        answer = self.client.post("/dagster/graphql", json={"query": query, "variables": variables}).json()
        assert not answer.get("errors"), answer
        (value,) = answer["data"].values()
        return value

    def launch(self, job: str, folder: Path, how: str = LAUNCH) -> str:
        """Launch a job as the launchpad does; return the run's id."""
        folder.mkdir(exist_ok=True)
        selector = {"repositoryLocationName": "warm", "repositoryName": "__repository__", "jobName": job}
        config = {"ops": {"works": {"config": {"folder": str(folder)}}}}
        answer = self.ask(how, p={"selector": selector, "runConfigData": config, "mode": "default"})
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def status(self, run_id: str) -> str:
        """Return the state of a run."""
        return str(self.ask(STATUS, run=run_id)["status"])

    def end_of(self, run_id: str) -> str:
        """Wait for a run's final state."""
        wait_for(lambda: self.status(run_id) in ("SUCCESS", "FAILURE", "CANCELED"), 20, lambda: self.world.log)
        return self.status(run_id)

    def events(self, run_id: str, cursor: str | None = None) -> tuple[list[dict[str, Any]], str]:
        """Return the events of a run after a cursor, and the next cursor."""
        found = self.ask(EVENTS, run=run_id, cursor=cursor)
        return found["events"], found["cursor"]

    def started(self, run_id: str) -> list[str]:
        """Return the steps that a run started."""
        return [event["stepKey"] for event in self.events(run_id)[0] if event["eventType"] == "STEP_START"]

    def works(self, run_id: str, folder: Path) -> int:
        """Wait until the step has left its mark; return its process."""
        wait_for(lambda: (folder / "mark").exists() and (folder / "mark").read_text() != "", 20, lambda: self.world.log)
        assert self.status(run_id) == "STARTED"
        return int((folder / "mark").read_text())

    def airflow_log(self, job: str) -> str:
        """Return the log of the step in the newest run of a job, as Airflow's clients get it."""
        runs = self.client.get(f"/api/v1/dags/{job}/dagRuns", params={"order_by": "-start_date", "limit": 1}).json()
        name = quote(runs["dag_runs"][0]["dag_run_id"])
        return self.client.get(f"/api/v1/dags/{job}/dagRuns/{name}/taskInstances/works/logs/1").text

    @contextmanager
    def follow(self, run_id: str) -> Iterator[list[dict[str, Any]]]:
        """Follow the events of a run over a websocket; the list grows."""
        seen: list[dict[str, Any]] = []
        with self.client.websocket_connect("/dagster/graphql", subprotocols=["graphql-ws"]) as socket:
            socket.send_json({"type": "connection_init"})
            assert socket.receive_json()["type"] == "connection_ack"
            socket.send_json({"type": "start", "id": "1", "payload": {"query": FOLLOW, "variables": {"run": run_id}}})

            def listen() -> None:
                with contextlib.suppress(WebSocketDisconnect):
                    while (message := socket.receive_json())["type"] == "data":
                        seen.extend(message["payload"]["data"]["pipelineRunLogs"]["messages"])

            listener = threading.Thread(target=listen, daemon=True)
            listener.start()
            yield seen
            socket.send_json({"type": "stop", "id": "1"})
            socket.send_json({"type": "connection_terminate"})
            listener.join(1)


@pytest.fixture(scope="module")
def ui(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """The page over a deployment whose runs start warm and at once; there is no daemon."""
    home = tmp_path_factory.mktemp("ui")
    settings = {
        "run_coordinator": {"module": coordinator.__name__, "class": "QueuedRunCoordinator"},
        "compute_logs": {
            "module": compute_logs.__name__,
            "class": "DirectComputeLogManager",
            "config": {"base_dir": str(home / "storage"), "polling_timeout": 0.2},
        },
    }
    module = "clinical_orchestration_tests.execution.ui_definitions"
    database = new_database(postgres_env["POSTGRES_URL"], "warm_ui")
    page = PageSettings(
        DAGSTER_HOME=str(home), POSTGRES_URL=database, CLINICAL_HOME="", CLINICAL_PAGE_ALLOWED_HOSTS="testserver"
    )
    with ExitStack() as stack:
        world = stack.enter_context(warm_world(database, home, settings=settings, module=module))
        world.start_parent()
        context = world.context
        assert context is not None
        served = DagsterUi(lambda _: context)
        client = stack.enter_context(TestClient(create_app(page, served, EverybodyIs("Admin"))))
        assert served.wait(60)
        yield Ui(client, world)


@pytest.mark.parametrize("job", JOBS)
def test_a_run_is_launched_and_its_logs_are_seen_while_it_runs(ui: Ui, tmp_path: Path, job: str) -> None:
    run_id = ui.launch(job, tmp_path)
    with ui.follow(run_id) as seen:
        ui.works(run_id, tmp_path)

        wait_for(lambda: any(event.get("message") == "it works" for event in seen), 10, lambda: f"{seen}")
        early, cursor = ui.events(run_id)
        assert "it works" in [event["message"] for event in early]
        [captured] = [
            event for event in early if event["eventType"] == "LOGS_CAPTURED" and "works" in event["stepKeys"]
        ]
        key = [run_id, "compute_logs", captured["fileKey"]]
        output = ui.ask(OUTPUT, key=key)
        assert output["stdout"].endswith("it has begun\n")
        assert "this is a warning\n" in output["stderr"]
        assert not ui.ask(OUTPUT, key=key, cursor=output["cursor"])["stdout"]
        log = ui.airflow_log(job)
        assert "it works" in log
        assert "[stdout] it has begun\n" in log
        assert "[stderr] this is a warning\n" in log
        assert "***" not in log, "what is printed is known to be of this step, also when steps share a process"

        (tmp_path / "go").write_text("succeed")
        assert ui.end_of(run_id) == "SUCCESS"
        wait_for(lambda: any(event.get("eventType") == "RUN_SUCCESS" for event in seen), 10, lambda: f"{seen}")
    late, _ = ui.events(run_id, cursor)
    assert "it works" not in [event["message"] for event in late]
    assert "RUN_SUCCESS" in [event["eventType"] for event in late]
    assert ui.ask(OUTPUT, key=key, cursor=output["cursor"])["stdout"] == "it goes on\n"
    assert not [message for message in ui.world.messages(run_id) if "Not started warm" in message]


@pytest.mark.parametrize("job", JOBS)
def test_a_run_is_cancelled(ui: Ui, tmp_path: Path, job: str) -> None:
    run_id = ui.launch(job, tmp_path, LAUNCH_RUN)
    pid = ui.works(run_id, tmp_path)

    answer = ui.ask(TERMINATE, run=run_id)

    assert answer["__typename"] == "TerminateRunSuccess", answer
    assert ui.end_of(run_id) == "CANCELED"
    wait_for(lambda: not psutil.pid_exists(pid), 5)
    assert "after" not in ui.started(run_id)
    assert not ui.ask(STATUS, run=run_id)["canTerminate"]


@pytest.mark.parametrize("job", JOBS)
def test_a_failed_run_goes_on_from_its_failure(ui: Ui, tmp_path: Path, job: str) -> None:
    first = ui.launch(job, tmp_path)
    (tmp_path / "go").write_text("fail")
    assert ui.end_of(first) == "FAILURE"
    assert sorted(ui.started(first)) == ["before", "beside", "works"]
    (tmp_path / "go").write_text("succeed")
    begun = time.monotonic()

    answer = ui.ask(AGAIN, p={"parentRunId": first, "strategy": "FROM_FAILURE"})

    assert answer["__typename"] == "LaunchRunSuccess", answer
    assert (answer["run"]["parentRunId"], answer["run"]["rootRunId"]) == (first, first)
    second = answer["run"]["runId"]
    assert ui.end_of(second) == "SUCCESS"
    assert ui.started(second) == ["works", "after"]
    assert time.monotonic() - begun < 10
    assert ui.status(first) == "FAILURE"
