"""Batch Spark applications: submit, status, logs, kill, wait.

Three ways, one interface (:class:`SparkJobs`), chosen by :func:`spark_jobs`:

- :class:`StandaloneJobs`: a standalone cluster runs the driver; asked over its REST submission server
  (``http://master:6066/v1/submissions``, Spark's own protocol, here as Spark 4.1 speaks it);
- :class:`ProcessJobs` with a master URL: ``SparkSubmit`` in client mode, as a process of this machine;
- :class:`ProcessJobs` without one: the script's ``main(spark)`` in a Spark Connect session, in a process of its own.

Processes are known by id and start time and leave their state and log in a folder, so any later process (another shell,
an asset, a notebook) can ask for them. The process outlives whoever submitted it.

A script serves all three when it looks like this::

    def main(spark, arguments):
        ...

    if __name__ == "__main__":
        import sys
        from pyspark.sql import SparkSession

        main(SparkSession.builder.getOrCreate(), sys.argv[1:])
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from clinical_orchestration.settings import ClientSettings

RUNNER = "clinical_orchestration.stores.spark_job_runner"
JOB_FILE, STATE_FILE, LOG_FILE = "job.json", "state.json", "log.txt"
GRACE_SECONDS = 10.0
"""How long a job may take to end itself when it is killed, before the system ends it."""

_TIMEOUT_SECONDS = 10.0
_JOB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class SparkJobError(RuntimeError):
    """Spark refused a request about a job; the message says what it said."""


class SparkMasterUnavailableError(SparkJobError):
    """The cluster does not answer; the message says where it was expected."""


class UnknownJobError(SparkJobError):
    """There is no such job."""


class JobState(StrEnum):
    """What became of a job."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class JobStatus:
    """The state of one job.

    Attributes:
        message: why it failed, in one line; empty otherwise.
        where: the process, or the cluster's worker, that runs it.
        started_at, ended_at: UTC; None where that is not known.
    """

    job_id: str
    name: str
    state: JobState
    message: str = ""
    where: str = ""
    started_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def over(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.state in (JobState.FINISHED, JobState.FAILED, JobState.KILLED)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {
            "job_id": self.job_id,
            "name": self.name,
            "state": self.state.value,
            "message": self.message,
            "where": self.where,
            "started_at": None if self.started_at is None else self.started_at.isoformat(),
            "ended_at": None if self.ended_at is None else self.ended_at.isoformat(),
        }


class SparkJobs(Protocol):
    """Submits applications and tells what became of them."""

    def submit(
        self,
        application: str,
        arguments: Sequence[str] = (),
        *,
        name: str | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """Start an application and return at once.

        Args:
            application: path of a Python script, or the name of a module; what each way accepts is in its class.
            arguments: given to it.
            name: shown in Spark's own pages; default: the script's name.
            properties: Spark properties, such as ``spark.executor.memory``.

        Raises:
            SparkJobError: it could not be started.
        """
        ...

    def status(self, job_id: str) -> JobStatus:
        """Return the state of a job.

        Raises:
            UnknownJobError: there is no such job.
        """
        ...

    def logs(self, job_id: str, lines: int = 100) -> list[str]:
        """Return the last lines that the job wrote.

        Raises:
            UnknownJobError: there is no such job.
            SparkJobError: the log is out of reach; the message says where it is.
        """
        ...

    def kill(self, job_id: str) -> bool:
        """End a job; return whether it was still going on.

        Raises:
            UnknownJobError: there is no such job.
        """
        ...

    def jobs(self) -> list[JobStatus]:
        """Return the jobs that are known, newest first."""
        ...


def wait(
    jobs: SparkJobs,
    job_id: str,
    *,
    timeout_seconds: float | None = None,
    poll_seconds: float = 1.0,
    on_change: Callable[[JobStatus], None] | None = None,
) -> JobStatus:
    """Wait until a job has ended, and return its state.

    Args:
        jobs: whom to ask.
        job_id: the job.
        timeout_seconds: longest wait; None: without end.
        poll_seconds: time between two questions.
        on_change: called with every new state.

    Raises:
        TimeoutError: it has not ended in time; it goes on.
        UnknownJobError: there is no such job.
    """
    begin = time.monotonic()
    seen: JobState | None = None
    while True:
        status = jobs.status(job_id)
        if status.state is not seen:
            seen = status.state
            if on_change is not None:
                on_change(status)
        if status.over:
            return status
        if timeout_seconds is not None and time.monotonic() - begin > timeout_seconds:
            raise TimeoutError(f"job {job_id} is still {status.state.value} after {timeout_seconds:g} s; it goes on")
        time.sleep(poll_seconds)


# --- processes of this machine ---------------------------------------------------------------------------------------


class ProcessJobs:
    """Jobs as processes of this machine.

    Args:
        folder: keeps a folder a job: what was asked, the state and the log.
        submit_command: the start of the ``SparkSubmit`` command, such as ``["java", ..., "...SparkSubmit", "--master",
            "spark://host:7077"]``; None runs the script's ``main(spark)`` in a Spark Connect session.
        environment: added to that of this process; None takes a variable out.

    With a `submit_command` the application is the path of a script (or a jar); without one it is the path of a script
    or the name of a module, with a function ``main(spark)`` or ``main(spark, arguments)``.
    """

    def __init__(
        self,
        folder: Path,
        submit_command: Sequence[str] | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self._folder = folder
        self._command = None if submit_command is None else list(submit_command)
        self._environment = dict(environment or {})

    def submit(
        self,
        application: str,
        arguments: Sequence[str] = (),
        *,
        name: str | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """See :class:`SparkJobs`."""
        path = Path(application).expanduser()
        is_file = path.is_file()
        looks_like_module = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", application) and path.suffix != ".py"
        if not is_file and (self._command is not None or not looks_like_module):
            raise SparkJobError(f"there is no file {application}; give the path of a script")
        application = str(path.resolve()) if is_file else application
        name = name or (path.stem if is_file else application)
        job_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{_slug(name)}-{secrets.token_hex(3)}"
        settings = dict(properties or {})
        command = None
        if self._command is not None:
            options = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
            command = [*self._command, "--name", name, *options, application, *arguments]
        place = self._folder / job_id
        place.mkdir(parents=True, mode=0o700)
        _write(
            place / JOB_FILE,
            {
                "name": name,
                "application": application,
                "arguments": list(arguments),
                "properties": settings,
                "command": command,
                "submitted_at": datetime.now(UTC).isoformat(),
            },
        )
        environment: dict[str, str | None] = {**os.environ, **self._environment}
        with (place / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", RUNNER, str(place)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in environment.items() if value is not None},
                start_new_session=True,  # it outlives this process, and can be ended as a group
            )
        _write(place / "process.json", {"pid": process.pid, "created": _created(process.pid)})
        _children.append(process)
        return self.status(job_id)

    def status(self, job_id: str) -> JobStatus:
        """See :class:`SparkJobs`."""
        place = self._place(job_id)
        job = _read(place / JOB_FILE)
        known = JobStatus(job_id, job["name"], JobState.SUBMITTED, started_at=_time(job.get("submitted_at")))
        state = _read(place / STATE_FILE)
        process = _read(place / "process.json")
        alive = _is_alive(process)
        if not state.get("state"):
            if alive or not process:
                return replace(known, where=_where(process))
            state = _read(place / STATE_FILE)  # it may have written its state and ended between the two questions
        found = JobState(state.get("state") or JobState.FAILED)
        status = replace(
            known,
            state=found,
            message=str(state.get("message") or ""),
            where=_where(process),
            started_at=_time(state.get("started_at")) or known.started_at,
            ended_at=_time(state.get("ended_at")),
        )
        if not status.over and not alive:
            state = _read(place / STATE_FILE)
            if state.get("state") and JobState(state["state"]) is not found:
                return self.status(job_id)
            return replace(status, state=JobState.FAILED, message="its process ended without saying why; see the log")
        if found is JobState.FAILED and not status.message:
            return replace(status, message="its process ended before it began; see the log")
        return status

    def logs(self, job_id: str, lines: int = 100) -> list[str]:
        """See :class:`SparkJobs`."""
        from collections import deque

        with (self._place(job_id) / LOG_FILE).open(encoding="utf-8", errors="replace") as stream:
            return [line.rstrip("\n") for line in deque(stream, maxlen=max(0, lines))]

    def kill(self, job_id: str) -> bool:
        """See :class:`SparkJobs`."""
        place = self._place(job_id)
        if self.status(job_id).over:
            return False
        process = _read(place / "process.json")
        for sign, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5.0)):
            if not _is_alive(process):
                break
            with contextlib.suppress(ProcessLookupError):
                # the runner passes a SIGTERM on and waits; SIGKILL goes to everything it started
                (os.kill if sign is signal.SIGTERM else os.killpg)(process["pid"], sign)
            deadline = time.monotonic() + seconds
            while _is_alive(process) and time.monotonic() < deadline:
                time.sleep(0.05)
        state = _read(place / STATE_FILE)
        if JobState(state.get("state") or JobState.SUBMITTED) in (JobState.SUBMITTED, JobState.RUNNING):
            _write(place / STATE_FILE, {**state, "state": JobState.KILLED, "ended_at": datetime.now(UTC).isoformat()})
        return self.status(job_id).state is JobState.KILLED

    def jobs(self) -> list[JobStatus]:
        """See :class:`SparkJobs`."""
        if not self._folder.is_dir():
            return []
        ids = sorted((place.parent.name for place in self._folder.glob(f"*/{JOB_FILE}")), reverse=True)
        return [self.status(job_id) for job_id in ids]

    def _place(self, job_id: str) -> Path:
        place = self._folder / job_id
        if not _JOB_ID.match(job_id) or not (place / JOB_FILE).is_file():
            raise UnknownJobError(f"there is no job {job_id!r} in {self._folder}")
        return place


_children: list[subprocess.Popen[bytes]] = []


def _is_alive(process: Mapping[str, Any]) -> bool:
    """Return whether the very process runs: the same number may belong to another one by now."""
    for child in list(_children):
        if child.poll() is not None:  # ours are reaped, or they would look alive for ever
            _children.remove(child)
    return bool(process) and process.get("created") is not None and _created(process["pid"]) == process["created"]


def _created(pid: int) -> float | None:
    import psutil

    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except psutil.NoSuchProcess:
        return None


def _where(process: Mapping[str, Any]) -> str:
    return f"process {process['pid']}" if process else ""


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40].lower() or "job"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return dict(found)


def _time(text: object) -> datetime | None:
    return datetime.fromisoformat(text) if isinstance(text, str) else None


# --- a standalone cluster --------------------------------------------------------------------------------------------

_DRIVER_STATES = {
    "SUBMITTED": JobState.SUBMITTED,
    "RELAUNCHING": JobState.SUBMITTED,
    "RUNNING": JobState.RUNNING,
    "FINISHED": JobState.FINISHED,
    "KILLED": JobState.KILLED,
    "FAILED": JobState.FAILED,
    "ERROR": JobState.FAILED,
    "UNKNOWN": JobState.RUNNING,  # the master lost its worker for a moment
}


class StandaloneJobs:
    """Jobs whose driver runs in a standalone cluster, through the master's REST submission server.

    Args:
        rest_url: the server, ``http://master:6066``; the master has it with ``spark.master.rest.enabled``.
        master_url: what the driver connects to, ``spark://master:7077``.
        ui_url: the master's page, ``http://master:8080``: with it :meth:`jobs` and :meth:`logs` work.
        client_version: version that the requests say.
        timeout_seconds: of one request.

    An application is a path that the workers can read (or an address, such as ``s3a://``), to a Python script or a
    jar's main class as ``class@jar``. Python drivers are started by the class ``SparkSubmit`` in the cluster, because
    the protocol itself only knows jars.
    """

    def __init__(
        self,
        rest_url: str,
        master_url: str,
        *,
        ui_url: str = "",
        client_version: str = "4.1.1",
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> None:
        self._rest = rest_url.rstrip("/")
        self._master = master_url
        self._ui = ui_url.rstrip("/")
        self._version = client_version
        self._timeout = timeout_seconds

    def submit(
        self,
        application: str,
        arguments: Sequence[str] = (),
        *,
        name: str | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> JobStatus:
        """See :class:`SparkJobs`."""
        main_class, _, jar = application.partition("@")
        title = name or Path(urlsplit(jar or application).path).stem
        settings = {"spark.master": self._master, "spark.app.name": title, **(properties or {})}
        if jar:
            body: dict[str, Any] = {"appResource": jar, "mainClass": main_class, "appArgs": list(arguments)}
            settings = {"spark.jars": jar, "spark.submit.deployMode": "cluster", **settings}
        else:
            options = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
            body = {
                "appResource": "",
                "mainClass": "org.apache.spark.deploy.SparkSubmit",
                "appArgs": [*options, application, *arguments],
            }
        answer = self._ask(
            "POST",
            "create",
            {
                "action": "CreateSubmissionRequest",
                "clientSparkVersion": self._version,
                "environmentVariables": {"SPARK_ENV_LOADED": "1"},
                "sparkProperties": settings,
                **body,
            },
        )
        if not answer.get("success"):
            raise SparkJobError(f"the cluster refused the application: {_line(answer.get('message'))}")
        return JobStatus(str(answer["submissionId"]), title, JobState.SUBMITTED, started_at=datetime.now(UTC))

    def status(self, job_id: str) -> JobStatus:
        """See :class:`SparkJobs`."""
        answer = self._ask("GET", f"status/{_checked(job_id)}")
        if not answer.get("success"):
            raise UnknownJobError(
                f"the cluster at {self._rest} knows no job {job_id}"
                + (f": {_line(answer['message'])}" if answer.get("message") else "")
            )
        state = _DRIVER_STATES.get(str(answer.get("driverState")), JobState.RUNNING)
        message = ""
        if state is JobState.FAILED:
            message = _line(answer["message"]) if answer.get("message") else "the driver failed; its log says why"
        return JobStatus(job_id, job_id, state, message=message, where=str(answer.get("workerHostPort") or ""))

    def logs(self, job_id: str, lines: int = 100) -> list[str]:
        """See :class:`SparkJobs`; what the driver wrote to its standard error and then to its standard output."""
        import httpx

        status = self.status(job_id)
        worker = self._worker(job_id)
        if not worker:
            raise SparkJobError(
                f"the log of {job_id} is kept by its worker {status.where or '(none has it yet)'}"
                + ("" if self._ui else "; set SPARK_UI_URL to the master's page to read it here")
            )
        found: list[str] = []
        for kind in ("stderr", "stdout"):
            try:
                answer = httpx.get(
                    f"{worker}/log/",
                    params={"driverId": job_id, "logType": kind, "byteLength": str(256 * max(1, lines))},
                    timeout=self._timeout,
                    follow_redirects=True,
                )
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise SparkJobError(f"the worker at {worker} does not give the log ({type(error).__name__})") from None
            # the first line says which bytes these are
            found += answer.text.splitlines()[1:]
        return found[-lines:] if lines > 0 else []

    def kill(self, job_id: str) -> bool:
        """See :class:`SparkJobs`."""
        self.status(job_id)
        return bool(self._ask("POST", f"kill/{_checked(job_id)}").get("success"))

    def jobs(self) -> list[JobStatus]:
        """See :class:`SparkJobs`; none where the master's page is not known."""
        cluster = self._cluster()
        drivers = [*cluster.get("activedrivers", []), *cluster.get("completeddrivers", [])]
        found = [
            JobStatus(
                driver["id"],
                driver["id"],
                _DRIVER_STATES.get(str(driver.get("state")), JobState.RUNNING),
                where=str(driver.get("worker") or ""),
                started_at=datetime.fromtimestamp(int(driver["starttime"]) / 1000, tz=UTC),
            )
            for driver in drivers
        ]
        return sorted(found, key=lambda status: status.job_id, reverse=True)

    def _worker(self, job_id: str) -> str:
        cluster = self._cluster()
        pages = {worker["id"]: str(worker.get("webuiaddress") or "") for worker in cluster.get("workers", [])}
        for driver in [*cluster.get("activedrivers", []), *cluster.get("completeddrivers", [])]:
            if driver["id"] == job_id:
                return pages.get(driver.get("worker"), "")
        return ""

    def _cluster(self) -> dict[str, Any]:
        if not self._ui:
            return {}
        return dict(_get_json(f"{self._ui}/json/", self._timeout, "the Spark master's page"))

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            answer = httpx.request(method, f"{self._rest}/v1/submissions/{path}", json=body, timeout=self._timeout)
            content = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise SparkMasterUnavailableError(
                f"the Spark submission server at {self._rest} does not answer ({type(error).__name__}); "
                "start the master with spark.master.rest.enabled, or set SPARK_REST_URL"
            ) from None
        if not isinstance(content, dict) or content.get("action") == "ErrorResponse" or answer.is_error:
            said = content.get("message") if isinstance(content, dict) else content
            raise SparkJobError(f"the Spark submission server refused {path}: {_line(said)}")
        return content


def _checked(job_id: str) -> str:
    if not _JOB_ID.match(job_id):
        raise UnknownJobError(f"{job_id!r} is no id of a job")
    return job_id


def _line(text: object) -> str:
    """Return the first line of what the server says, without its stack trace."""
    lines = [line.strip() for line in re.split(r"\n|\t(?=[\w$.]+\()", str(text or "").strip()) if line.strip()]
    if not lines:
        return "no reason was given"
    words = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # "Exception from the cluster:"
    return words[:300]


# --- Spark's monitoring API ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a running application is, in tasks of all its jobs so far."""

    application_id: str
    name: str
    completed: bool
    jobs: int
    running_jobs: int
    failed_jobs: int
    tasks: int
    completed_tasks: int
    failed_tasks: int


class SparkMonitor:
    """Spark's monitoring API (``/api/v1``) of a driver's page (port 4040) or of a history server (port 18080)."""

    def __init__(self, url: str, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._url = url.rstrip("/")
        self._timeout = timeout_seconds

    def applications(self) -> list[dict[str, Any]]:
        """Return the applications as Spark gives them: ``id``, ``name`` and ``attempts`` with times and ``completed``.

        Raises:
            SparkMasterUnavailableError: nothing answers there.
        """
        return list(_get_json(f"{self._url}/api/v1/applications", self._timeout, "Spark's monitoring API"))

    def progress(self, application_id: str) -> Progress:
        """Return how far an application is.

        Raises:
            UnknownJobError: there is no such application.
            SparkMasterUnavailableError: nothing answers there.
        """
        known = {application["id"]: application for application in self.applications()}
        if application_id not in known:
            raise UnknownJobError(f"Spark at {self._url} knows no application {application_id!r}")
        address = f"{self._url}/api/v1/applications/{application_id}/jobs"
        jobs: list[dict[str, Any]] = list(_get_json(address, self._timeout, "Spark's monitoring API"))
        application = known[application_id]
        attempts = application.get("attempts") or [{}]
        return Progress(
            application_id=application_id,
            name=str(application.get("name", "")),
            completed=bool(attempts[0].get("completed", False)),
            jobs=len(jobs),
            running_jobs=sum(job.get("status") == "RUNNING" for job in jobs),
            failed_jobs=sum(job.get("status") == "FAILED" for job in jobs),
            tasks=sum(int(job.get("numTasks", 0)) for job in jobs),
            completed_tasks=sum(int(job.get("numCompletedTasks", 0)) for job in jobs),
            failed_tasks=sum(int(job.get("numFailedTasks", 0)) for job in jobs),
        )


def _get_json(address: str, timeout: float, who: str) -> Any:
    import httpx

    try:
        answer = httpx.get(address, timeout=timeout, follow_redirects=True)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise SparkMasterUnavailableError(f"{who} does not answer at {address} ({type(error).__name__})") from None


class ClusterSettings(BaseSettings):
    """Where a standalone cluster answers; empty where there is none."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore")

    rest_url: str = Field("", alias="SPARK_REST_URL", description="submission server, such as http://master:6066")
    ui_url: str = Field("", alias="SPARK_UI_URL", description="the master's page, such as http://master:8080")


# --- choice ----------------------------------------------------------------------------------------------------------


def submit_command(master_url: str, *, java: str | None = None, java_options: Sequence[str] = ()) -> list[str]:
    """Return the start of a ``SparkSubmit`` command for a master.

    ``spark-submit`` of ``SPARK_HOME`` where that is set, else the class in pyspark's jars through `java` (default: the
    one of ``JAVA_HOME``, else of the path).

    Raises:
        SparkJobError: there is no Java.
    """
    import importlib.util
    import shutil

    home = os.environ.get("SPARK_HOME", "").strip()
    if home and Path(home, "bin", "spark-submit").is_file() and java is None:
        return [str(Path(home, "bin", "spark-submit")), "--master", master_url]
    java_home = os.environ.get("JAVA_HOME", "").strip()
    program = java or (str(Path(java_home, "bin", "java")) if java_home else shutil.which("java"))
    found = importlib.util.find_spec("pyspark")
    if not program or found is None or not found.submodule_search_locations:
        raise SparkJobError("spark-submit needs Java 17 or newer and pyspark; set JAVA_HOME or SPARK_HOME")
    jars = str(Path(found.submodule_search_locations[0], "jars", "*"))
    return [program, *java_options, "-cp", jars, "org.apache.spark.deploy.SparkSubmit", "--master", master_url]


def spark_jobs(
    settings: ClientSettings | None = None,
    *,
    master_url: str | None = None,
    java: str | None = None,
    java_options: Sequence[str] = (),
) -> SparkJobs:
    """Return the way that fits the deployment.

    ``SPARK_REST_URL`` names a standalone cluster's submission server; else the variable `spark_master_url` a master
    for ``SparkSubmit``; else the script's ``main`` runs in a Spark Connect session with ``SPARK_REMOTE``.
    """
    from clinical_orchestration.settings import ClientSettings as Settings
    from clinical_orchestration.settings import Variables

    settings = settings or Settings()
    master = Variables().spark_master_url if master_url is None else master_url
    cluster = ClusterSettings()
    if cluster.rest_url:
        host = urlsplit(cluster.rest_url).hostname or "127.0.0.1"
        return StandaloneJobs(cluster.rest_url, master or f"spark://{host}:7077", ui_url=cluster.ui_url)
    folder = settings.home.expanduser().absolute() / "data" / "spark-jobs"
    if not master or master.startswith("sc://"):
        return ProcessJobs(folder, environment={"SPARK_REMOTE": master or settings.spark_remote})
    environment: dict[str, str | None] = {
        "SPARK_REMOTE": None,  # SparkSubmit refuses it beside a master, even when it is empty
        # a Connect session of this process leaves these in its environment; the script would look for a server then
        "SPARK_CONNECT_MODE_ENABLED": None,
        "SPARK_LOCAL_REMOTE": None,
        "PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON") or sys.executable,
        "PYSPARK_DRIVER_PYTHON": os.environ.get("PYSPARK_DRIVER_PYTHON") or sys.executable,
    }
    return ProcessJobs(folder, submit_command(master, java=java, java_options=java_options), environment)
