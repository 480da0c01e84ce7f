"""Where steps run: in processes of their own, in one they share, in containers; by setting and by tag."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from dagster import DagsterEventType, DagsterInvalidDefinitionError
from dagster._config import process_config
from dagster._core.event_api import EventLogCursor
from dagster._core.execution.api import create_execution_plan

from clinical_orchestration.execution import isolation, steps
from clinical_orchestration.execution.isolation import DOCKER, EXECUTOR_TAG, KUBERNETES, runs_in
from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.container_stand_ins import Docker, Kubernetes, StandIn, serving
from clinical_orchestration_tests.execution.isolation_world import CONTAINER, contained
from clinical_orchestration_tests.execution.test_steps import Ran, Worker, made_home, work
from clinical_orchestration_tests.execution.warm_world import ROOT, wait_for

pytestmark = pytest.mark.integration
WORLD = "clinical_orchestration_tests.execution.isolation_world"
IMAGE = "clinical:test"


@pytest.fixture(scope="module")
def home(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `dagster.yaml` on a database of its own."""
    return made_home(new_database(postgres_env["POSTGRES_URL"], "isolation"), tmp_path_factory.mktemp("isolation"))


@pytest.fixture(scope="module")
def engines(home: Path) -> Iterator[dict[str, StandIn]]:
    """Docker and Kubernetes."""
    base = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STEPS_NOTES": str(home / "notes"),
        "DAGSTER_HOME": str(home),
    }
    docker, kubernetes = Docker(base, home / "docker.log"), Kubernetes(base, home / "kubernetes.log")
    for engine in (docker, kubernetes):
        engine.log.touch()
    with serving(docker), serving(kubernetes):
        (home / "kubeconfig").write_text(yaml.safe_dump(kubernetes.configuration()))
        yield {DOCKER: docker, KUBERNETES: kubernetes}


def _work(home: Path, engines: dict[str, StandIn]) -> Iterator[Worker]:
    docker = engines[DOCKER].url.replace("http:", "tcp:")
    yield from work(home, WORLD, DOCKER_HOST=docker, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", GREETING="hello")


@pytest.fixture(scope="module")
def worker(home: Path, engines: dict[str, StandIn]) -> Iterator[Worker]:
    """A worker that knows where Docker is, for the tests that let it live."""
    yield from _work(home, engines)


@pytest.fixture
def mortal(home: Path, engines: dict[str, StandIn]) -> Iterator[Worker]:
    """A worker of one test."""
    yield from _work(home, engines)


def _config(worker: Worker, choice: str) -> dict[str, Any]:
    options = {
        DOCKER: {"image": IMAGE, "env_vars": ["GREETING"]},
        KUBERNETES: {
            "job_image": IMAGE,
            "job_namespace": "trials",
            "load_incluster_config": False,
            "kubeconfig_file": str(worker.notes.parent / "kubeconfig"),
            "env_vars": ["GREETING"],
        },
    }
    return {"execution": {"config": {"steps": choice, choice: options[choice], **CONTAINER}}}


def test_steps_share_a_process_beside_forked_ones(worker: Worker) -> None:
    ran = worker.run("mixed")

    assert ran.status == "SUCCESS", ran.why()
    starts = {one.step_key: one.pid for one in ran.events(DagsterEventType.STEP_START)}
    [restart] = ran.events(DagsterEventType.STEP_RESTARTED)
    assert starts["one"] == starts["two"] == starts["dies_once"]
    assert len({starts["one"], starts["forked"], restart.pid, worker.process.pid}) == 4
    begun = [one.step_key for one in ran.events(DagsterEventType.STEP_START)]
    later = begun[1]
    assert ran.said(f"{begun[0]} {later} in ") == str(starts[later]), "what one step left is there for the next"
    assert ran.said(f"forked in {starts['forked']} with ") == "0", "and does not reach the run's worker"
    [again] = ran.events(DagsterEventType.STEP_UP_FOR_RETRY, "dies_once")
    assert "SIGKILL" in again.step_retry_data.error.message  # type: ignore[union-attr]
    assert ran.said("0 kept in ") == str(restart.pid)


def test_a_job_of_steps_in_process_runs_in_the_worker_itself(worker: Worker) -> None:
    ran = worker.run("together")

    assert ran.status == "SUCCESS", ran.why()
    assert ran.said("processes") == f"{worker.process.pid} {worker.process.pid}"


def test_a_shared_process_is_interrupted_and_what_waits_for_it_does_not_begin(worker: Worker) -> None:
    run_id = worker.start("interrupted")
    [_, pid] = worker.note(run_id, "sleeps")
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    worker.instance.report_run_canceling(run)
    begun = time.monotonic()

    worker.process.send_signal(signal.SIGINT)

    assert worker.line() == "CANCELED"
    assert time.monotonic() - begun < 2
    assert not psutil.pid_exists(int(pid))
    ran = Ran("CANCELED", worker.instance.all_logs(run_id))
    assert len([one for one in ran.events(DagsterEventType.STEP_START) if one.step_key in ("sleeps", "waits")]) == 1


def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(worker: Worker) -> None:
    with pytest.raises(DagsterInvalidDefinitionError, match="forked, in_process, docker, kubernetes"):
        runs_in("podman")

    ran = worker.run("unknown")

    assert ran.status == "FAILURE"
    assert f"steps do not run in 'podman'; {EXECUTOR_TAG} is one of forked, in_process, docker, kubernetes" in ran.why()
    assert ran.events(DagsterEventType.STEP_START) == []
    ran = worker.run("contained", {"execution": {"config": {"steps": "podman"}}})
    assert ran.status == "FAILURE"
    assert "in_process, docker, kubernetes" in ran.why()


def test_a_package_that_is_not_installed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dagster_k8s", None)
    with pytest.raises(DagsterInvalidDefinitionError, match="extra `kubernetes`"):
        isolation._official(KUBERNETES)
    monkeypatch.setitem(sys.modules, "dagster_docker", None)
    with pytest.raises(DagsterInvalidDefinitionError, match=r"uv sync --inexact --extra docker"):
        isolation._official(DOCKER)


@pytest.mark.parametrize("choice", [DOCKER, KUBERNETES])
def test_a_step_runs_in_a_container_and_is_tried_again_in_another(
    worker: Worker, engines: dict[str, StandIn], choice: str
) -> None:
    ran = worker.run("contained", _config(worker, choice))

    assert ran.status == "SUCCESS", ran.why() + engines[choice].log.read_text()[-4000:]
    [again] = ran.events(DagsterEventType.STEP_UP_FOR_RETRY, "away")
    said = again.step_retry_data.error.message  # type: ignore[union-attr]
    assert "does not run any more" in said
    assert ("Return code is -9" if choice == DOCKER else "failed Kubernetes job") in said
    assert ran.said(f"in {IMAGE}, ") == "hello"
    assert ran.said("back from") == "nowhere"
    assert [one.step_key for one in ran.events(DagsterEventType.STEP_START)] == ["near", "away", "back"]
    assert [one.step_key for one in ran.events(DagsterEventType.STEP_RESTARTED)] == ["away"]
    mine = [one for one in engines[choice].containers.values() if one.environment["DAGSTER_RUN_STEP_KEY"] == "away"]
    wait_for(lambda: [one.status for one in mine] == [-9, 0], 20)
    assert not any(one.stopped for one in mine)


@pytest.mark.parametrize("choice", [DOCKER, pytest.param(KUBERNETES, marks=pytest.mark.slow)])
def test_a_cancelled_run_stops_its_container(worker: Worker, engines: dict[str, StandIn], choice: str) -> None:
    run_id = worker.start("staying", _config(worker, choice))
    [_, pid, *_] = worker.note(run_id, "stays", 60)
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    if choice == DOCKER:  # is away for a while, which changes nothing
        engines[choice].away = True
        wait_for(lambda: "cannot be seen" in str(worker.instance.all_logs(run_id)), 10)
        engines[choice].away = False
        assert psutil.pid_exists(int(pid))
    worker.instance.report_run_canceling(run)

    worker.process.send_signal(signal.SIGINT)

    assert worker.line() == "CANCELED"
    if choice == KUBERNETES:  # which does not wait for its pods
        wait_for(lambda: not psutil.pid_exists(int(pid)), 10)
    assert not psutil.pid_exists(int(pid))
    ran = Ran("CANCELED", worker.instance.all_logs(run_id))
    assert "Interrupted" in ran.failure("stays")
    assert "after" not in ran.failure("stays")


def test_a_container_whose_watcher_is_killed_is_stopped(worker: Worker, engines: dict[str, StandIn]) -> None:
    run_id = worker.start("staying", _config(worker, DOCKER))
    [_, pid, *_] = worker.note(run_id, "stays", 60)
    [watcher] = psutil.Process(worker.process.pid).children()

    watcher.kill()

    assert worker.line() == "FAILURE"
    assert not psutil.pid_exists(int(pid))
    ran = Ran("FAILURE", worker.instance.all_logs(run_id))
    assert len(ran.events(DagsterEventType.STEP_FAILURE, "stays")) == 1


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_container(mortal: Worker, worker: Worker, engines: dict[str, StandIn]) -> None:
    run_id = mortal.start("outliving", _config(mortal, DOCKER))
    [_, pid, *_] = mortal.note(run_id, "waits", 60)
    mortal.process.kill()
    mortal.process.wait()
    assert psutil.pid_exists(int(pid))

    assert worker.start("outliving", run_id) == run_id
    (worker.notes / f"{run_id}-go").touch()

    ran = Ran(worker.line(), worker.instance.all_logs(run_id))
    assert ran.status == "SUCCESS", ran.why()
    assert [one.step_key for one in ran.events(DagsterEventType.STEP_START)] == ["near", "waits", "back"]
    assert {one.pid for one in ran.events(DagsterEventType.STEP_START, "waits")} == {int(pid)}


class Log:
    """An event log of one run, whose events can appear out of turn."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def get_records_for_run(self, run_id: str, cursor: str | None, limit: int) -> Any:
        after = EventLogCursor.parse(cursor).storage_id() if cursor else 0
        numbers = [number for number in sorted(self.numbers) if number > after]
        entry = SimpleNamespace(dagster_event=object())
        return SimpleNamespace(
            records=[SimpleNamespace(storage_id=number, event_log_entry=entry) for number in numbers[:limit]],
            has_more=len(numbers) > limit,
        )


def test_an_event_that_appears_late_is_followed_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_PAGE", 2)
    now = [100.0]
    monkeypatch.setattr(isolation.time, "monotonic", lambda: now[0])
    log = Log()
    stored = isolation.StoredEvents(log, "run")  # type: ignore[arg-type]

    def after(seconds: float, *numbers: int) -> list[int]:
        now[0] += seconds
        log.numbers += numbers
        return [number for number, _ in stored.new()]

    assert after(0, 1, 2, 5) == [1, 2, 5]
    assert after(5, 4) == [4]
    assert after(1) == []
    assert after(5, 6) == [6]
    assert after(5, 7) == [7]
    assert stored.newest == 7
    assert after(20, 8) == [8]


def test_assets_of_one_step_may_not_choose_differently() -> None:
    @dg.multi_asset(specs=[dg.AssetSpec("a", tags=runs_in(DOCKER)), dg.AssetSpec("b", tags=runs_in(KUBERNETES))])
    def both():  # type: ignore[no-untyped-def]
        """Make two assets."""

    @dg.multi_asset(specs=[dg.AssetSpec("c", tags=runs_in(DOCKER)), dg.AssetSpec("d")])
    def one_of_two():  # type: ignore[no-untyped-def]
        """Make two assets, one of which chooses."""

    job = dg.Definitions(assets=[both, one_of_two]).resolve_implicit_global_asset_job_def()
    steps = {step.key: step for step in create_execution_plan(job).step_dict.values()}
    assert isolation.choice_of(steps["one_of_two"], job.asset_layer, isolation.FORKED) == DOCKER
    with pytest.raises(DagsterInvalidDefinitionError, match=r"tags clinical/executor differ \(docker, kubernetes\)"):
        isolation.choice_of(steps["both"], job.asset_layer, isolation.FORKED)


def test_no_container_is_started_where_the_worker_cannot_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "why_not_fork", lambda: "libraries have started threads")
    plan = create_execution_plan(contained)
    config = process_config(
        steps.forked_executor.config_schema.config_type, {"steps": DOCKER, DOCKER: {"image": IMAGE}}
    ).value
    executor = steps.forked_executor.executor_creation_fn(SimpleNamespace(executor_config=config))  # type: ignore[misc]
    context = SimpleNamespace(job=SimpleNamespace(get_definition=lambda: contained))
    with pytest.raises(DagsterInvalidDefinitionError, match="libraries have started threads"):
        list(executor.execute(context, plan))
