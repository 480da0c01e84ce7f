"""Airflow as its documentation installs it, in an environment of its own: LocalExecutor, PostgreSQL, REST."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.orchestration import ROOT, say
from benchmarks.orchestration.deployments import STOP_SECONDS, Times
from clinical_orchestration.stack.ports import LOOPBACK, Reservations
from clinical_orchestration.stack.process import end_group, log_tail, spawn

VERSION = "2.11.0"
RELEASED = "2025-05-21"
CONSTRAINTS = "https://raw.githubusercontent.com/apache/airflow/constraints-{version}/constraints-{python}.txt"
DAG = "empty_pipeline"
PASSWORD = "admin"  # noqa: S105 - of a database that lives for minutes
READY_SECONDS = 180

TIMES = """
SELECT r.state, extract(epoch FROM min(t.start_date)), extract(epoch FROM r.end_date), count(t.end_date)
FROM dag_run r JOIN task_instance t ON t.dag_id = r.dag_id AND t.run_id = r.run_id
WHERE r.run_id = %s GROUP BY r.state, r.end_date"""


def install(constraints: str) -> tuple[Path, str]:
    """Make the environment, once; return its Python, and what decided its packages' versions.

    Where the published constraints cannot be reached, uv takes the newest packages of the day of the release.

    Args:
        constraints: file or URL of the constraints; empty for the published ones.
    """
    import pytest

    from clinical_orchestration_tests.airflow.environments import environment, find_uv

    python = ".".join(str(part) for part in sys.version_info[:2])
    published = CONSTRAINTS.format(version=VERSION, python=python)
    packages = (f"apache-airflow=={VERSION}", "psycopg2-binary")
    try:
        return environment(*packages, "--constraint", constraints or published), constraints or published
    except pytest.skip.Exception as error:
        if constraints or not find_uv():
            raise SystemExit(
                f"Airflow cannot be installed: {error}\nGive its constraints by --airflow-constraints, or put uv on "
                "PATH, which can do without them."
            ) from None
        say(f"{published} cannot be had; the newest packages of {RELEASED} are taken")
    try:
        return environment(*packages, "--exclude-newer", RELEASED), f"the newest packages of {RELEASED}"
    except pytest.skip.Exception as error:
        raise SystemExit(f"Airflow cannot be installed: {error}") from None


class Airflow:
    """Scheduler and web server over an empty database.

    Args:
        python: of its environment.
        home: its folder.
        database: its own, empty one.
    """

    def __init__(self, python: Path, home: Path, database: str) -> None:
        self._program = str(python.with_name("airflow"))
        self._home = home
        self._database = database
        self._ports = Reservations()
        self._port = self._ports.pick()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._cursor: Any = None

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        settings = {
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__DAGS_FOLDER": str(ROOT / "benchmarks" / "orchestration" / "airflow_dags"),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "DATABASE__SQL_ALCHEMY_CONN": self._database,
            "API__AUTH_BACKENDS": "airflow.api.auth.backend.basic_auth",
            "LOGGING__WORKER_LOG_SERVER_PORT": str(self._ports.pick()),
            "WEBSERVER__SECRET_KEY": "benchmark",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        return {
            **kept,
            "AIRFLOW_HOME": str(self._home),
            "PATH": os.pathsep.join([str(Path(self._program).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(ROOT),  # the DAG reads the tasks and edges where Dagster's jobs do
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
        }

    def start(self) -> None:
        """Make the tables and a user, and start the processes; they are ready after :meth:`wait_ready`."""
        self._home.mkdir(parents=True)
        environment = self._environment()
        user = ("--username", "admin", "--password", PASSWORD, "--role", "Admin", "--email", "admin@example.com")
        for arguments in (
            ("db", "migrate"),
            ("users", "create", "--firstname", "A", "--lastname", "B", *user),
        ):
            done = subprocess.run(
                [self._program, *arguments], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"airflow {' '.join(arguments[:2])} failed: {done.stderr[-2000:]}")
        for name, arguments in (("scheduler", ()), ("webserver", ("--port", str(self._port), "--workers", "2"))):
            log = self._home / "benchmark-logs" / f"{name}.log"
            command = [self._program, name, *arguments]
            self._processes.append(spawn(command, log=log, environment=environment, folder=self._home))

    def wait_ready(self) -> None:
        """Wait until the scheduler lives and knows the DAG."""
        end = time.monotonic() + READY_SECONDS
        while not self._ready():
            if time.monotonic() > end or any(process.poll() is not None for process in self._processes):
                logs = "\n".join(
                    f"{log.name}: {log_tail(log, 10)}" for log in (self._home / "benchmark-logs").iterdir()
                )
                raise SystemExit(f"Airflow did not start:\n{logs}")
            time.sleep(0.5)
        import psycopg2

        connection = psycopg2.connect(self._database)
        connection.autocommit = True
        self._cursor = connection.cursor()

    def _ready(self) -> bool:
        try:
            _, health = self._ask("GET", "/health")
            status, _ = self._ask("GET", f"/api/v1/dags/{DAG}")
        except (OSError, http.client.HTTPException, ValueError):
            return False
        return bool(health["scheduler"]["status"] == "healthy") and status == 200

    def stop(self) -> None:
        """End the processes."""
        if self._cursor is not None:
            self._cursor.connection.close()
        while self._processes:
            end_group(self._processes.pop(), STOP_SECONDS)

    def _ask(self, method: str, path: str, body: dict[str, object] | None = None) -> tuple[int, Any]:
        login = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(LOOPBACK, self._port, timeout=60)) as connection:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def run(self) -> Times:
        """Trigger a run by REST and wait for its success; return what Airflow's own rows say of the time."""
        began = time.time()
        status, answer = self._ask("POST", f"/api/v1/dags/{DAG}/dagRuns", {})
        if status != 200:
            raise SystemExit(f"Airflow did not take the trigger: {status} {answer}")
        while True:
            self._cursor.execute(TIMES, (answer["dag_run_id"],))
            row = self._cursor.fetchone()
            if row is not None and row[0] == "success":
                return Times(float(row[1]) - began, float(row[2]) - began)
            if (row is not None and row[0] == "failed") or time.time() > began + 300:
                raise SystemExit(f"Airflow's run did not succeed: {row}; see {self._home}")
            time.sleep(0.1)
