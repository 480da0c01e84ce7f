"""A Dagster deployment whose runs are started warm: instance, code server, and a parent that tests may kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.storage.dagster_run import DagsterRun
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

from clinical_orchestration.execution.protocol import Meeting, ParentGoneError

ROOT = Path(__file__).resolve().parents[2]
MODULE = "clinical_orchestration_tests.execution.warm_definitions"
MARK = "CLINICAL_WARM_TEST"

STOCK = {"postgres": {"postgres_url": {"env": "POSTGRES_URL"}}}
POOLED = {
    "custom": {
        "module": "clinical_orchestration.execution.storage",
        "class": "PooledPostgresStorage",
        "config": {"postgres_url": {"env": "POSTGRES_URL"}},
    }
}


@dataclass
class World:
    """The deployment. `meeting` is where the parent is met."""

    instance: DagsterInstance
    home: Path
    meeting: Meeting
    mark: str
    module: str = MODULE
    context: WorkspaceProcessContext | None = None
    options: list[str] = field(default_factory=list)
    parent: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What the parent wrote so far."""
        return (self.home / "parent.log").read_text()

    def start_parent(self, *options: str, ready: bool = True) -> None:
        """Start a parent, and wait until it answers."""
        command = [sys.executable, "-m", "clinical_orchestration.execution.parent"]
        with (self.home / "parent.log").open("ab") as log:
            self.parent = subprocess.Popen(
                [
                    *command,
                    *("--folder", str(self.meeting.folder), "--module-name", self.module),
                    *("--working-directory", str(ROOT), "--location-name", "warm"),
                    *self.options,
                    *options,
                ],
                cwd=ROOT,
                env={**os.environ, MARK: self.mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if ready:
            parent = self.parent
            wait_for(lambda: parent.poll() is not None or self.ping() is not None, 120, lambda: self.log)
            assert parent.poll() is None, self.log

    def ping(self) -> dict[str, Any] | None:
        """Ask the parent how it is, None when nobody answers."""
        try:
            return self.meeting.ask({"ask": "ping"}, 5)
        except ParentGoneError:
            return None

    def stop_parent(self) -> None:
        """End the parent as the stack does."""
        if self.parent is not None:
            self.parent.terminate()
            try:
                self.parent.wait(30)
            finally:
                self.parent.kill()
                self.parent = None

    def kill_parent(self) -> None:
        """Kill the parent; what it leaves goes on."""
        assert self.parent is not None
        self.parent.kill()
        self.parent.wait()
        self.parent = None

    def create(self, job: str, config: dict[str, Any] | None = None, tags: dict[str, str] | None = None) -> DagsterRun:
        """Make a run of a job of the code location."""
        assert self.context is not None
        location = self.context.create_request_context().get_code_location("warm")
        [repository] = location.get_repositories().values()
        remote = repository.get_full_job(job)
        from importlib import import_module

        definition = import_module(self.module).defs.resolve_job_def(job)
        return self.instance.create_run_for_job(
            definition,
            run_config={"ops": config} if config else None,
            tags=tags,
            remote_job_origin=remote.get_remote_origin(),
            job_code_origin=remote.get_python_origin(),
        )

    def launch(self, job: str, config: dict[str, Any] | None = None) -> str:
        """Create and launch a run."""
        run = self.create(job, config)
        assert self.context is not None
        self.instance.launch_run(run.run_id, self.context.create_request_context())
        return run.run_id

    def status(self, run_id: str) -> DagsterRunStatus:
        """Return the state of a run."""
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    def end_of(self, run_id: str, seconds: float = 30) -> DagsterRunStatus:
        """Wait for a run's final state and for its process to be forgotten."""
        wait_for(
            lambda: self.instance.get_run_by_id(run_id).is_finished,  # type: ignore[union-attr]
            seconds,
            lambda: f"{self.status(run_id)}\n{self.log}",
        )
        wait_for(lambda: self.meeting.workers.of(run_id) is None, seconds, lambda: self.log)
        return self.status(run_id)

    def messages(self, run_id: str) -> list[str]:
        """Return what the events of a run say."""
        return [entry.message or entry.user_message for entry in self.instance.all_logs(run_id)]

    def events(self, run_id: str, kind: str) -> int:
        """Return how many events of a kind a run has."""
        return sum(
            entry.dagster_event is not None and entry.dagster_event.event_type_value == kind
            for entry in self.instance.all_logs(run_id)
        )

    def processes(self) -> list[psutil.Process]:
        """Return the processes that the parents of this world have left or have now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def wait_for(condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {why()[-4000:]}")
        time.sleep(0.02)


@contextmanager
def warm_world(
    database: str,
    home: Path,
    *,
    storage: dict[str, Any] = POOLED,
    settings: dict[str, Any] | None = None,
    module: str = MODULE,
    code_server: bool = True,
) -> Iterator[World]:
    """Give a deployment; no parent runs yet. Afterwards nothing of it runs any more."""
    home.mkdir(parents=True, exist_ok=True)
    meeting = Meeting(home / "meeting")
    configuration = {
        "storage": storage,
        "run_launcher": {
            "module": "clinical_orchestration.execution.launcher",
            "class": "WarmRunLauncher",
            "config": {"folder": str(meeting.folder)},
        },
        "compute_logs": {
            "module": "dagster._core.storage.noop_compute_log_manager",
            "class": "NoOpComputeLogManager",
        },
        "telemetry": {"enabled": False},
        **(settings or {}),
    }
    (home / "dagster.yaml").write_text(yaml.safe_dump(configuration))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(home))
        patch.setenv("POSTGRES_URL", database)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        instance = stack.enter_context(DagsterInstance.get())
        world = World(instance, home, meeting, mark=str(home), module=module)
        if code_server:
            stack.callback(_end_code_server, home)
            target = ModuleTarget(module, attribute=None, working_directory=str(ROOT), location_name="warm")
            world.context = stack.enter_context(WorkspaceProcessContext(instance, target))
        try:
            yield world
        finally:
            world.stop_parent()
            left = world.processes()
            for process in left:
                process.kill()
            psutil.wait_procs(left, 10)


def _end_code_server(home: Path) -> None:
    """See to it that the code server has ended: one that started a run ends only while there is a database."""
    servers = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(home) in part for part in process.cmdline()):
                servers.append(process)
    _, alive = psutil.wait_procs(servers, 10)
    for process in alive:
        process.kill()


__all__ = ["POOLED", "ROOT", "STOCK", "World", "json", "signal", "wait_for", "warm_world"]
