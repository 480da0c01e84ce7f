"""Runs while processes and connections are killed at random: each ends truly, none runs twice, nothing is left.

What the steps wrote down on disk says what happened; the database has to agree with it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from dagster import DagsterRunStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import GrpcServerTarget
from sqlalchemy.exc import DBAPIError

from clinical_orchestration.execution.storage import shared_engine
from clinical_orchestration.stack.probes import ProbeError, dagster_code_server
from clinical_orchestration_tests.databases import temporary_database
from clinical_orchestration_tests.execution import kills_definitions
from clinical_orchestration_tests.execution.kills_definitions import NOTES, STEPS, lines
from clinical_orchestration_tests.execution.warm_world import MARK, ROOT, World, wait_for, warm_world

MODULE = kills_definitions.__name__
AT_ONCE = 6
SETTINGS = {
    "run_coordinator": {
        "module": "clinical_orchestration.execution.coordinator",
        "class": "QueuedRunCoordinator",
        "config": {"dequeue_interval_seconds": 1},
    },
    "concurrency": {"runs": {"max_concurrent_runs": AT_ONCE}},
    "run_monitoring": {"enabled": True, "poll_interval_seconds": 2, "start_timeout_seconds": 60},
}
VICTIMS = {"worker": 8, "step": 6, "database": 8, "version": 1, "parent": 1, "daemon": 1}


class Supervisor:
    """Starts a process again when it has ended, as the stack does."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._stopping = threading.Event()
        self.process = start()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopping.wait(0.05):
            if self.process.poll() is not None:
                self.process = self._start()

    def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        self._thread.join()
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@dataclass
class Deployment:
    """A world with a code server, a daemon and a parent that are started again, and what was done to its runs."""

    world: World
    database: str
    notes: Path
    parent: Supervisor
    daemon: Supervisor
    touched: set[str] = field(default_factory=set)
    kills: Counter[str] = field(default_factory=Counter)

    def submit(self, chance: random.Random) -> None:
        """Submit a run; an error of the database is the caller's, and the run, if there is one, has to end as well.

        Most wait until there is a parent: else most would start cold, and these are the code server's.
        """
        if chance.random() < 0.8:
            self.wait_for_the_parent()
        config = {step: {"config": {"seconds": chance.uniform(0.0, 0.4)}} for step in STEPS}
        assert self.world.context is not None
        with suppress(DBAPIError):
            run = self.world.create(chance.choice(("in_process", "forked")), config)
            self.world.instance.submit_run(run.run_id, self.world.context.create_request_context())

    def wait_for_the_parent(self) -> None:
        """Wait until runs are started warm."""
        wait_for(lambda: self.world.ping() is not None, 120, lambda: self.world.log)

    def kill(self, victim: str, chance: random.Random) -> None:
        """Kill one of a kind, when there is one; note which run it belonged to."""
        if victim in ("parent", "daemon"):
            (self.parent if victim == "parent" else self.daemon).process.kill()
            self.kills[victim] += 1
            return
        kill = {
            "worker": self._kill_worker,
            "step": self._kill_step,
            "database": self._end_connection,
            "version": self._kill_version,
        }[victim]
        patience = time.monotonic() + 10
        while not (killed := kill(chance)) and time.monotonic() < patience:
            time.sleep(0.02)
        self.kills[victim] += killed

    def _kill_worker(self, chance: random.Random) -> bool:
        workers = list(self.world.meeting.workers)
        if not workers:
            return False
        worker = chance.choice(workers)
        self.touched.add(worker.run_id)
        return worker.process.signal(signal.SIGKILL)

    def _kill_step(self, chance: random.Random) -> bool:
        steps = []
        for worker in self.world.meeting.workers:
            with suppress(psutil.Error):
                steps += [(worker.run_id, child) for child in psutil.Process(worker.process.pid).children()]
        if not steps:
            return False
        run_id, step = chance.choice(steps)
        self.touched.add(run_id)
        with suppress(psutil.NoSuchProcess):
            step.kill()
        return True

    def _kill_version(self, chance: random.Random) -> bool:
        """Of the parent's processes those that lead a session execute runs."""
        versions = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.parent.process.pid).children():
                with suppress(ProcessLookupError):
                    if os.getsid(child.pid) != child.pid:
                        versions.append(child)
        if not versions:
            return False
        with suppress(psutil.NoSuchProcess):
            chance.choice(versions).kill()
        return True

    def _end_connection(self, chance: random.Random) -> bool:
        with _connected(self.database) as cursor:
            cursor.execute(
                "SELECT pid, client_port FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY pid"
            )
            found = cursor.fetchall()
            if not found:
                return False
            backend, port = chance.choice(found)
            self.touched.update(self._runs_of(port))
            cursor.execute("SELECT pg_terminate_backend(%s)", (backend,))
        return True

    def _runs_of(self, port: int) -> Iterator[str]:
        """Give the run whose process, or one of whose steps, has a connection from a port."""
        for connection in psutil.net_connections("tcp"):
            if connection.pid and connection.laddr and connection.laddr.port == port:
                with suppress(ProcessLookupError):
                    session = os.getsid(connection.pid)
                    yield from (one.run_id for one in self.world.meeting.workers if one.process.pid == session)

    def check(self, run_id: str) -> DagsterRunStatus:
        """Compare how a run ended with what happened."""
        status = self.world.end_of(run_id, 180)
        noted = lines(self.notes / run_id)
        begun = [(step, attempt) for what, step, attempt, *_ in noted if what == "begin"]
        what = f"{run_id}: {status}\n{noted}\n" + "\n".join(self.world.messages(run_id))
        assert len(set(begun)) == len(begun), f"a step ran twice: {what}"
        assert len({worker for *_, worker in noted}) <= 1, f"two processes executed the run: {what}"
        ends = [self.world.events(run_id, f"PIPELINE_{kind}") for kind in ("SUCCESS", "FAILURE", "CANCELED")]
        if status is DagsterRunStatus.SUCCESS:
            assert {step for kind, step, *_ in noted if kind == "end"} == set(STEPS), what
            assert ends == [1, 0, 0], what
        else:
            assert status is DagsterRunStatus.FAILURE, what
            assert ends == [0, 1, 0], what
            run = self.world.instance.get_run_by_id(run_id)
            assert run is not None
            cold = GRPC_INFO_TAG in run.tags and self.kills["database"]  # which connections it has is not known
            assert run_id in self.touched or cold or not noted, f"it failed though nobody did anything to it: {what}"
        return status


@contextmanager
def _connected(database: str) -> Iterator[Any]:
    connection = psycopg2.connect(database, application_name="kills")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def _others(database: str) -> int:
    with _connected(database) as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def _started(world: World, name: str, *command: str) -> subprocess.Popen[bytes]:
    with (world.home / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, MARK: world.mark},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _start_parent(world: World) -> subprocess.Popen[bytes]:
    world.start_parent(ready=False)
    assert world.parent is not None
    return world.parent


@contextmanager
def _deployment(database: str, home: Path) -> Iterator[Deployment]:
    """Give a deployment that is up; afterwards nothing of it runs any more."""
    notes = home / "notes"
    notes.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "workspace.yaml").write_text(
        f"load_from:\n  - grpc_server:\n      host: 127.0.0.1\n      port: {port}\n      location_name: warm\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NOTES, str(notes))
        with warm_world(database, home, settings=SETTINGS, module=MODULE, code_server=False) as world:
            with ExitStack() as stack:
                parent = Supervisor(lambda: _start_parent(world))
                stack.callback(parent.stop)
                place = ("--module-name", MODULE, "--working-directory", str(ROOT), "--location-name", "warm")
                server = _started(world, "code", "dagster", "api", "grpc", "--port", str(port), *place)
                stack.callback(server.wait, 30)
                stack.callback(server.terminate)
                wait_for(lambda: _answers(port), 60, lambda: (home / "code.log").read_text())
                coordinator = ("clinical_orchestration.execution.coordinator", "-w", str(home / "workspace.yaml"))
                daemon = Supervisor(lambda: _started(world, "daemon", *coordinator))
                stack.callback(daemon.stop)
                target = GrpcServerTarget(host="127.0.0.1", port=port, socket=None, location_name="warm")
                world.context = stack.enter_context(WorkspaceProcessContext(world.instance, target))
                deployment = Deployment(world, database, notes, parent, daemon)
                deployment.wait_for_the_parent()
                yield deployment
            wait_for(lambda: world.processes() == [], 5, lambda: str([one.cmdline() for one in world.processes()]))
            assert os.listdir(world.meeting.folder) == ["runs"]
            assert os.listdir(world.meeting.folder / "runs") == []


def _answers(port: int) -> bool:
    try:
        dagster_code_server(port, 2)
    except (ProbeError, OSError):
        return False
    return True


def _play(deployment: Deployment, runs: int, seed: int) -> None:
    """Submit runs while another thread kills."""
    submitting, killing = random.Random(seed), random.Random(-seed)
    plan = [*VICTIMS, *killing.choices(list(VICTIMS), list(VICTIMS.values()), k=runs // 2)]
    killing.shuffle(plan)
    errors: list[BaseException] = []

    def kill() -> None:
        try:
            for victim in plan:
                time.sleep(killing.uniform(0.0, 1.0))
                deployment.kill(victim, killing)
                if killing.random() < 0.7:  # else the next one is killed while another is being started
                    deployment.wait_for_the_parent()
        except BaseException as error:
            errors.append(error)

    killer = threading.Thread(target=kill)
    killer.start()
    for _ in range(runs):
        deployment.submit(submitting)
        time.sleep(submitting.uniform(0.0, 0.9))
    killer.join()
    assert errors == []


@pytest.mark.parametrize(
    ("runs", "seed"),
    [
        pytest.param(12, 6),
        *(pytest.param(200, seed, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]) for seed in (7, 8, 9)),
    ],
)
def test_every_run_ends_truly(postgres_env: dict[str, str], tmp_path: Path, runs: int, seed: int) -> None:
    home = tmp_path / "home"
    with temporary_database(postgres_env["POSTGRES_URL"], "kills") as database:
        with _deployment(database, home) as deployment:
            _play(deployment, runs, seed)
            world = deployment.world
            found = world.instance.get_run_ids()
            assert runs - deployment.kills["database"] <= len(found) <= runs
            ended = Counter(deployment.check(run_id) for run_id in found)
            unbegun = sum(
                world.status(run_id) is DagsterRunStatus.FAILURE and not lines(deployment.notes / run_id)
                for run_id in found
            )
            handing_over = sum(deployment.kills.values()) - deployment.kills["step"]
            print(f"{dict(ended)}, not begun: {unbegun}, killed: {dict(deployment.kills)}")  # noqa: T201
            assert unbegun <= handing_over
            assert set(+deployment.kills) == set(VICTIMS), "nothing of a kind was killed"
            assert set(os.listdir(deployment.notes)) <= set(found), "a run that nobody knows"
        shared_engine(database).dispose()
        wait_for(lambda: _others(database) == 0, 10)
