"""Dagster deployments as they are run: web server, code server, run launcher and daemon as processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.orchestration import ROOT
from clinical_orchestration.execution.protocol import Meeting, ParentGoneError
from clinical_orchestration.stack import probes, starting
from clinical_orchestration.stack.ports import LOOPBACK, Reservations
from clinical_orchestration.stack.process import end_group, log_tail, spawn

LOCATION = "benchmark"
MODULE = "benchmarks.orchestration.definitions"
REPOSITORY = {"repositoryLocationName": LOCATION, "repositoryName": "__repository__"}
READY_SECONDS = 180
STOP_SECONDS = 20
FINAL = ("SUCCESS", "FAILURE", "CANCELED")

LAUNCH = """mutation launch($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
START_SCHEDULE = """mutation start($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {
  __typename ... on ScheduleStateResult { scheduleState { id } } ... on PythonError { message } } }"""
STOP_SCHEDULE = """mutation stop($id: String!) { stopRunningSchedule(id: $id) {
  __typename ... on PythonError { message } } }"""
LOADED = """{ workspaceOrError { __typename ... on Workspace { locationEntries {
  locationOrLoadError { __typename ... on PythonError { message } } } } } }"""

TIMES = """
SELECT extract(epoch FROM min(timestamp) FILTER (WHERE dagster_event_type = 'STEP_START') AT TIME ZONE 'UTC'),
       extract(epoch FROM max(timestamp) FILTER (WHERE dagster_event_type IN
               ('PIPELINE_SUCCESS', 'PIPELINE_FAILURE', 'PIPELINE_CANCELED')) AT TIME ZONE 'UTC')
FROM event_logs WHERE run_id = %s"""
TICKS = """
SELECT r.run_id, t.value::timestamptz, extract(epoch FROM r.create_timestamp AT TIME ZONE current_setting('TimeZone'))
FROM runs r JOIN run_tags t ON t.run_id = r.run_id AND t.key = '.dagster/scheduled_execution_time'"""


@dataclass(frozen=True)
class Times:
    """Seconds from the trigger to the start of the first step and to the end of the run."""

    first: float
    end: float


@contextmanager
def parts_of(own: bool, *, queued: bool = True) -> Iterator[None]:
    """Set the variables that say whether the platform's own parts or Dagster's are taken."""
    values = {name: value if own else "default" for name, value in starting.OWN.items()}
    if not queued:
        values[starting.COORDINATOR] = "default"
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def dagster_yaml(*, own: bool, queued: bool) -> dict[str, Any]:
    """Return the platform's own settings of an instance, with Dagster's parts or the platform's."""
    with parts_of(own, queued=queued):
        text = starting.dagster_yaml((ROOT / "dagster.yaml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = yaml.safe_load(text)
    if not queued:
        settings["run_coordinator"] = {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"}
        del settings["concurrency"]["runs"]
    return settings


class Deployment:
    """One deployment with an instance, a database and processes of its own.

    Args:
        title: what it is called in logs.
        home: its folder.
        database: its own, empty one.
        own: the platform's parts; else Dagster's.
        queued: runs go through the run queue; else they are launched where they are submitted.
        daemon: it has a daemon, which a queue needs and schedules need.
    """

    def __init__(self, title: str, home: Path, database: str, *, own: bool, queued: bool, daemon: bool) -> None:
        self.title = title
        self.home = home
        self._own = own
        self._queued = queued
        self._daemon = daemon
        self._database = database
        self._ports = Reservations()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._code_port, self._port = self._ports.pick(), self._ports.pick()
        self._meeting = Meeting(starting.meeting_folder(home))
        self._cursor: Any = None

    # -- processes

    def start(self) -> None:
        """Start what has the code loaded; :meth:`serve` follows, then :meth:`wait_ready`."""
        dagster_home = self.home / "dagster"
        dagster_home.mkdir(parents=True)
        (self.home / "storage").mkdir()
        settings = dagster_yaml(own=self._own, queued=self._queued)
        (dagster_home / "dagster.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        server = {"grpc_server": {"host": LOOPBACK, "port": self._code_port, "location_name": LOCATION}}
        (dagster_home / "workspace.yaml").write_text(yaml.safe_dump({"load_from": [server]}), encoding="utf-8")
        self._make_tables(dagster_home)
        code = ("--module-name", MODULE, "--location-name", LOCATION, "--working-directory", str(ROOT))
        where = ("--host", LOOPBACK, "--port", str(self._code_port))
        self._spawn("code_server", "dagster", "api", "grpc", *where, "--log-level", "warning", *code)
        if self._own:
            parent = "clinical_orchestration.execution.parent"
            self._spawn("run_launcher", parent, "--folder", str(self._meeting.folder), *code)

    def serve(self) -> None:
        """Start what asks the code server, as soon as that answers."""
        self._wait(lambda: probes.dagster_code_server(self._code_port, 3))
        workspace = str(self.home / "dagster" / "workspace.yaml")
        if self._daemon:
            queue = self._own and self._queued
            program = ("clinical_orchestration.execution.coordinator",) if queue else ("dagster._daemon", "run")
            self._spawn("daemon", *program, "-w", workspace)
        where = ("-h", LOOPBACK, "-p", str(self._port))
        self._spawn("web", "dagster_webserver", "-w", workspace, *where, "--log-level", "warning")

    def wait_ready(self) -> None:
        """Wait until runs can be launched."""
        if self._own:
            self._wait(lambda: self._meeting.ask({"ask": "ping"}, 5))
        self._wait(lambda: self._ask("{ version }", {}))
        [entry] = self._ask(LOADED, {})["workspaceOrError"]["locationEntries"]
        if entry["locationOrLoadError"]["__typename"] != "RepositoryLocation":
            raise SystemExit(f"{self.title}: the code does not load: {entry['locationOrLoadError']}")
        import psycopg2

        connection = psycopg2.connect(self._database)
        connection.autocommit = True
        self._cursor = connection.cursor()

    def _wait(self, probe: Callable[[], object]) -> None:
        """Wait until something answers; `SystemExit` with the end of the logs when it does not."""
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                probe()
                return
            except (OSError, http.client.HTTPException, ParentGoneError, probes.ProbeError) as error:
                ended = [process.args for process in self._processes if process.poll() is not None]
                if ended or time.monotonic() > end:
                    logs = "\n".join(f"{log.name}: {log_tail(log)}" for log in (self.home / "logs").iterdir())
                    raise SystemExit(f"{self.title} did not start: {ended or error}\n{logs}") from None
            time.sleep(0.2)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "DAGSTER_HOME": str(self.home / "dagster"),
            "POSTGRES_URL": self._database,
            "CLINICAL_DAGSTER_STORAGE": str(self.home / "storage"),
            starting.LAUNCHER_FOLDER: str(starting.meeting_folder(self.home)),
            "PYTHONPATH": str(ROOT),
            # a machine that is busy otherwise makes figures worse, but does not end the measurement
            "DAGSTER_GRPC_TIMEOUT_SECONDS": "600",
        }

    def _make_tables(self, dagster_home: Path) -> None:
        """Make the tables once, before several processes would at the same time."""
        names = ("run_storage", "event_log_storage", "schedule_storage")
        code = f"from dagster import DagsterInstance as D; i = D.get(); [getattr(i, name) for name in {names}]"
        subprocess.run([sys.executable, "-c", code], env=self._environment(), cwd=dagster_home, check=True)

    def _spawn(self, name: str, *module: str) -> None:
        command = [sys.executable, "-m", *module]
        log = self.home / "logs" / f"{name}.log"
        self._processes.append(spawn(command, log=log, environment=self._environment(), folder=ROOT))

    def stop(self) -> None:
        """End the processes; the launcher ends its runs."""
        if self._cursor is not None:
            self._cursor.connection.close()
        while self._processes:
            end_group(self._processes.pop(), STOP_SECONDS)

    # -- runs

    def _ask(self, query: str, variables: Mapping[str, Any]) -> Any:
        with closing(http.client.HTTPConnection(LOOPBACK, self._port, timeout=120)) as connection:
            body = json.dumps({"query": query, "variables": variables})
            connection.request("POST", "/graphql", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        if answer.get("errors"):
            raise SystemExit(f"{self.title}: {answer['errors']}")
        return answer["data"]

    def launch(self, job: str) -> tuple[str, float]:
        """Launch a run by GraphQL; return its id, and when it was asked for (seconds since the epoch)."""
        selector = {**REPOSITORY, "pipelineName": job}
        began = time.time()
        answer = self._ask(LAUNCH, {"params": {"selector": selector, "mode": "default", "runConfigData": {}}})
        result = answer["launchRun"]
        if result["__typename"] != "LaunchRunSuccess":
            raise SystemExit(f"{self.title}: {job} was not launched: {result}")
        return result["run"]["runId"], began

    def run(self, job: str) -> Times:
        """Launch a run and wait for its success; return what its events say of the time."""
        run_id, began = self.launch(job)
        self.wait([run_id])
        first, end = self.times(run_id)
        return Times(first - began, end - began)

    def wait(self, run_ids: Sequence[str], seconds: float = 600) -> None:
        """Wait until runs have succeeded; `SystemExit` when one does not."""
        began = time.monotonic()
        while True:
            self._cursor.execute("SELECT run_id, status FROM runs WHERE run_id = ANY(%s)", (list(run_ids),))
            states = dict(self._cursor.fetchall())
            bad = {run_id: state for run_id, state in states.items() if state in FINAL and state != "SUCCESS"}
            if bad:
                raise SystemExit(f"{self.title}: runs did not succeed: {bad}; see {self.home / 'logs'}")
            if len(states) == len(run_ids) and all(state == "SUCCESS" for state in states.values()):
                return
            waited = time.monotonic() - began
            if waited > seconds:
                raise SystemExit(f"{self.title}: no end within {seconds:.0f} s: {states}")
            time.sleep(min(0.25, 0.02 + waited / 50))

    def times(self, run_id: str) -> tuple[float, float]:
        """Return when a run's first step started and when the run ended, in seconds since the epoch."""
        self._cursor.execute(TIMES, (run_id,))
        first, end = self._cursor.fetchone()
        return float(first), float(end)

    # -- schedules

    def start_schedule(self, name: str) -> str:
        """Switch a schedule on; return its id."""
        result = self._ask(START_SCHEDULE, {"selector": {**REPOSITORY, "scheduleName": name}})["startSchedule"]
        if result["__typename"] != "ScheduleStateResult":
            raise SystemExit(f"{self.title}: {name} was not started: {result}")
        return str(result["scheduleState"]["id"])

    def stop_schedule(self, identity: str) -> None:
        """Switch a schedule off."""
        result = self._ask(STOP_SCHEDULE, {"id": identity})["stopRunningSchedule"]
        if result["__typename"] != "ScheduleStateResult":
            raise SystemExit(f"{self.title}: the schedule was not stopped: {result}")

    def ticks(self) -> list[tuple[float, float]]:
        """Return of each scheduled run the seconds from its tick to its creation, and to its first step."""
        self._cursor.execute(TICKS)
        found = self._cursor.fetchall()
        self.wait([run_id for run_id, _, _ in found], 60)
        return [
            (float(created) - tick.timestamp(), self.times(run_id)[0] - tick.timestamp())
            for run_id, tick, created in found
        ]
