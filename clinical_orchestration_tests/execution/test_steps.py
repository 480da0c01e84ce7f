"""Forked steps, in a run worker of their own on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import AssetKey, DagsterEvent, DagsterEventType, DagsterInstance
from dagster._core.events.log import EventLogEntry

from clinical_orchestration.execution import compute_logs
from clinical_orchestration.execution import storage as pooled_storage
from clinical_orchestration.execution.steps import forked_executor, why_not_fork
from clinical_orchestration_tests.databases import new_database

pytestmark = pytest.mark.integration
WORLD = "clinical_orchestration_tests.execution.steps_world"


@dataclass
class Worker:
    """A process that runs jobs, and what they left in the database."""

    process: subprocess.Popen[str]
    instance: DagsterInstance
    notes: Path

    def start(self, job: str, config: dict[str, Any] | str | None = None) -> str:
        """Start a run, or resume the one of an id, and return its id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([job, config or {}]) + "\n")
        self.process.stdin.flush()
        return self.line()

    def line(self) -> str:
        """Return the worker's next answer."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, job: str, config: dict[str, Any] | None = None) -> Ran:
        """Run a job to its end."""
        run_id = self.start(job, config)
        return Ran(self.line(), self.instance.all_logs(run_id))

    def note(self, run_id: str, contains: str, seconds: float = 15) -> list[str]:
        """Wait for a line that a step noted, and return its words."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            place = self.notes / run_id
            for line in place.read_text().splitlines() if place.exists() else ():
                if contains in line:
                    return line.split()
            time.sleep(0.02)
        raise AssertionError(f"nobody noted {contains}")


@dataclass
class Ran:
    """A run that ended."""

    status: str
    entries: list[EventLogEntry]

    def why(self) -> str:
        """Return what went wrong."""
        found = [entry.dagster_event for entry in self.entries if entry.dagster_event is not None]
        return "\n".join(str(one.event_specific_data) for one in found if one.is_failure)

    def events(self, kind: DagsterEventType, step: str | None = None) -> list[DagsterEvent]:
        """Return its events of a kind, of one step or of all."""
        found = [entry.dagster_event for entry in self.entries if entry.dagster_event is not None]
        return [one for one in found if one.event_type is kind and step in (None, one.step_key)]

    def said(self, start: str) -> str:
        """Return the rest of the first log line that starts so."""
        for entry in self.entries:
            if entry.user_message.startswith(start):
                return entry.user_message.removeprefix(start).strip()
        raise AssertionError(f"nothing said {start}")

    def failure(self, step: str) -> str:
        """Return why a step failed."""
        [event] = self.events(DagsterEventType.STEP_FAILURE, step)
        error = event.step_failure_data.error
        assert error is not None
        return error.to_string()


@pytest.fixture(scope="module")
def home(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `dagster.yaml` on a database of its own."""
    return made_home(new_database(postgres_env["POSTGRES_URL"], "steps"), tmp_path_factory.mktemp("steps"))


def made_home(url: str, folder: Path) -> Path:
    """Write a `dagster.yaml` into a folder and return it."""
    (folder / "notes").mkdir()
    (folder / "dagster.yaml").write_text(
        yaml.safe_dump(
            {
                "storage": {
                    "custom": {
                        "module": pooled_storage.__name__,
                        "class": "PooledPostgresStorage",
                        "config": {"postgres_url": url},
                    }
                },
                "compute_logs": {
                    "module": compute_logs.__name__,
                    "class": "DirectComputeLogManager",
                    "config": {"base_dir": str(folder / "storage")},
                },
                "concurrency": {"pools": {"granularity": "op"}},
                "telemetry": {"enabled": False},
            }
        )
    )
    return folder


def work(home: Path, *modules: str, **variables: str) -> Iterator[Worker]:
    """Run a worker of the jobs in a module, with more variables in its environment."""
    environment = {**os.environ, "STEPS_NOTES": str(home / "notes"), "DAGSTER_HOME": str(home), **variables}
    with (
        DagsterInstance.from_config(str(home)) as instance,
        (home / "stderr").open("a") as errors,
        subprocess.Popen(
            [sys.executable, "-m", WORLD, str(home), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        worker = Worker(process, instance, home / "notes")
        assert worker.line() == "ready", (home / "stderr").read_text()
        yield worker
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


@pytest.fixture(scope="module")
def worker(home: Path) -> Iterator[Worker]:
    """A worker for the tests that let it live."""
    yield from work(home)


@pytest.fixture
def mortal(home: Path) -> Iterator[Worker]:
    """A worker of one test."""
    yield from work(home)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _gone(*pids: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(_lives(pid) for pid in pids)


def test_a_chain_succeeds_in_order_each_step_in_its_own_process(worker: Worker) -> None:
    ran = worker.run("chain")

    assert ran.status == "SUCCESS", ran.why()
    kinds = (DagsterEventType.STEP_WORKER_STARTING, DagsterEventType.STEP_START, DagsterEventType.STEP_SUCCESS)
    order = [
        (one.step_key, one.event_type)
        for entry in ran.entries
        if (one := entry.dagster_event) is not None and one.event_type in kinds
    ]
    steps = ["nothing", *(f"then_{number}" for number in range(4))]
    assert order == [(step, kind) for step in steps for kind in kinds]
    pids = {one.pid for one in ran.events(DagsterEventType.STEP_START)}
    assert len(pids) == 5
    assert worker.process.pid not in pids


def test_steps_run_at_the_same_time(worker: Worker) -> None:
    ran = worker.run("meeting")

    assert ran.status == "SUCCESS", ran.why()
    assert ran.said("processes") == "4"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("segfault", "SIGSEGV"),
        ("SIGKILL", "SIGKILL"),
        ("SIGTERM", "Interrupted"),
        ("exit", "status 7"),
        ("raise", "it was wrong"),
    ],
)
def test_a_step_that_dies_fails_alone(worker: Worker, how: str, reason: str) -> None:
    ran = worker.run("deadly", {"ops": {"dies": {"config": {"how": how}}}})

    assert ran.status == "FAILURE"
    assert reason in ran.failure("dies")
    assert ran.said("these are its last words") == ""
    assert len(ran.events(DagsterEventType.STEP_SUCCESS, "nothing")) == 1
    assert ran.events(DagsterEventType.STEP_START, "then") == []
    [failed] = ran.events(DagsterEventType.RUN_FAILURE)
    assert "dies" in (failed.message or "")


def test_steps_are_tried_again_as_their_policy_says(worker: Worker) -> None:
    ran = worker.run("retried")

    assert ran.status == "SUCCESS", ran.why()
    assert ran.said("attempts") == "1 and 2"
    assert len(ran.events(DagsterEventType.STEP_UP_FOR_RETRY, "dies_once")) == 1
    assert len(ran.events(DagsterEventType.STEP_UP_FOR_RETRY, "asks_again")) == 2


def test_pools_are_kept(worker: Worker) -> None:
    worker.instance.event_log_storage.set_concurrency_slots("one_at_a_time", 1)

    ran = worker.run("pooled")

    assert ran.status == "SUCCESS", ran.why()
    assert worker.instance.event_log_storage.get_concurrency_info("one_at_a_time").active_slot_count == 0


def test_dynamic_steps_and_resources(worker: Worker) -> None:
    ran = worker.run("dynamic")

    assert ran.status == "SUCCESS", ran.why()
    assert ran.said("total") == "12"


def test_a_resource_that_cannot_be_made_fails_its_step(worker: Worker) -> None:
    ran = worker.run("no_resource")

    assert ran.status == "FAILURE"
    assert "below zero" in ran.failure("parts")


def test_processes_have_different_random_numbers(worker: Worker) -> None:
    ran = worker.run("chances")

    assert ran.said("different") == "6"


def test_assets_and_checks_and_what_a_step_reads(worker: Worker) -> None:
    ran = worker.run("assets")

    assert ran.status == "FAILURE"
    assert len(ran.events(DagsterEventType.STEP_SUCCESS, "source")) == 1
    [made] = [one for one in ran.events(DagsterEventType.ASSET_MATERIALIZATION) if one.asset_key == AssetKey("copy")]
    figures = {name: value.value for name, value in made.step_materialization_data.materialization.metadata.items()}
    assert figures == {"rows": 3, "said": 1}
    assert len(ran.events(DagsterEventType.ASSET_CHECK_EVALUATION)) == 1
    assert ran.events(DagsterEventType.STEP_START, "never") == []


def test_output_is_read_while_the_step_runs_and_is_complete_when_it_was_killed(worker: Worker, tmp_path: Path) -> None:
    run_id = worker.start("talking", {"ops": {"talks": {"config": {"until": str(tmp_path / "go")}}}})
    manager = worker.instance.compute_log_manager
    deadline = time.monotonic() + 15
    while True:
        events = [record.dagster_event for record in worker.instance.all_logs(run_id)]
        keys = [one.logs_captured_data.file_key for one in events if one and one.event_type_value == "LOGS_CAPTURED"]
        output = manager.get_log_data(manager.build_log_key_for_run(run_id, keys[0])) if keys else None
        if output and output.stdout and b"from a child" in (output.stderr or b""):
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert output.stdout == f"this is {run_id}\n".encode()
    assert not manager.is_capture_complete(output.log_key)

    (tmp_path / "go").touch()

    assert worker.line() == "FAILURE"
    assert manager.is_capture_complete(output.log_key)
    assert b"Segmentation fault" in (manager.get_log_data(output.log_key).stderr or b"")
    assert "SIGSEGV" in Ran("FAILURE", worker.instance.all_logs(run_id)).failure("talks")


@pytest.mark.parametrize("deaf", [False, True])
def test_a_cancelled_run_ends_with_all_it_started(worker: Worker, deaf: bool) -> None:
    run_id = worker.start("long", {"ops": {"sleeps": {"config": {"deaf": deaf}}}})
    _, step, child = worker.note(run_id, "sleeps")
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    worker.instance.report_run_canceling(run)
    begun = time.monotonic()

    worker.process.send_signal(signal.SIGINT)

    assert worker.line() == "CANCELED"
    assert (1.0 <= time.monotonic() - begun < 4.0) if deaf else time.monotonic() - begun < 1.0
    assert _gone(int(step), int(child))
    ran = Ran("CANCELED", worker.instance.all_logs(run_id))
    assert ("was killed" if deaf else "Interrupted") in ran.failure("sleeps")
    if not deaf:
        assert worker.note(run_id, "cleaned up")


def test_no_step_outlives_its_run_worker(mortal: Worker) -> None:
    run_id = mortal.start("long", {"ops": {"sleeps": {"config": {"deaf": True}}}})
    _, step, child = mortal.note(run_id, "sleeps")

    mortal.process.kill()

    assert _gone(int(step))
    os.kill(int(child), signal.SIGKILL)  # of the step's own making: whoever watches the worker ends its session
    logs = Ran("", mortal.instance.all_logs(run_id))
    assert len(logs.events(DagsterEventType.STEP_START, "sleeps")) == 1


def test_a_process_with_foreign_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import ctypes, threading, time\n"
        "from clinical_orchestration.execution.steps import why_not_fork\n"
        "print(why_not_fork())\n"
        "def named():\n"
        "    ctypes.CDLL(None).prctl(15, b'polars-0', 0, 0, 0)\n"
        "    time.sleep(30)\n"
        "import _thread; _thread.start_new_thread(named, ()); time.sleep(0.2)\n"
        "print(why_not_fork())\n"
        "threading.Thread(target=time.sleep, args=(30,), name='watcher', daemon=True).start()\n"
        "print(why_not_fork())\n"
        "import os; os._exit(0)\n"
    )
    found = subprocess.run([sys.executable, "-u", "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert found.stdout.splitlines() == [
        "None",
        "libraries have started threads in the run worker: polars-0",
        "the run worker has threads: watcher",
    ]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (why_not_fork() or "")
    assert forked_executor.name == "forked"
