"""Runs that a warm parent cannot take or end as usual: too many, resumed, of other code, while the database is away."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dagster import DagsterRunStatus
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.errors import DagsterLaunchFailedError
from dagster._core.launcher import DefaultRunLauncher, LaunchRunContext
from dagster._daemon.monitoring import RESUME_RUN_LOG_MESSAGE, execute_run_monitoring_iteration

from clinical_orchestration.execution.launcher import WarmRunLauncher
from clinical_orchestration_tests.databases import execute, new_database
from clinical_orchestration_tests.execution import kills_definitions
from clinical_orchestration_tests.execution.kills_definitions import NOTES, STEPS, lines
from clinical_orchestration_tests.execution.warm_world import World, wait_for, warm_world

DATABASE = "warm_edges"
MONITORING = {"enabled": True, "poll_interval_seconds": 1, "start_timeout_seconds": 60, "max_resume_run_attempts": 1}


@pytest.fixture(scope="module")
def world(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    database = new_database(postgres_env["POSTGRES_URL"], DATABASE)
    home = tmp_path_factory.mktemp("edges")
    (home / "notes").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NOTES, str(home / "notes"))
        settings = {"run_monitoring": MONITORING}
        with warm_world(database, home, settings=settings, module=kills_definitions.__name__) as made:
            made.options = ["--runs", "2", "--cancel-seconds", "1.5", "--stop-seconds", "1.5"]
            yield made


@pytest.fixture
def parent(world: World) -> World:
    """The world with a parent that answers and executes two runs at a time."""
    if world.ping() is None:
        world.stop_parent()
        world.start_parent()
    return world


def _config(seconds: float) -> dict[str, Any]:
    return {step: {"config": {"seconds": seconds}} for step in STEPS}


def _launch(world: World, seconds: float, job: str = "in_process") -> str:
    return world.launch(job, _config(seconds))


def _begun(world: World, run_id: str) -> list[str]:
    return [step for what, step, *_ in lines(world.home / "notes" / run_id) if what == "begin"]


@contextmanager
def _launching(world: World, run_id: str) -> Iterator[threading.Thread]:
    """Launch a run that has to wait, in a thread."""
    assert world.context is not None
    workspace = world.context.create_request_context()
    thread = threading.Thread(target=world.instance.launch_run, args=(run_id, workspace))
    thread.start()
    try:
        yield thread
    finally:
        thread.join(30)


def test_runs_beyond_the_limit_wait_and_then_start(parent: World) -> None:
    before = [_launch(parent, 0.3) for _ in range(2)]
    run = parent.create("in_process", _config(0.0))
    with _launching(parent, run.run_id) as thread:
        wait_for(lambda: parent.status(run.run_id) is DagsterRunStatus.STARTING, 10)
        thread.join(0.4)
        assert thread.is_alive()
        assert (parent.ping() or {})["runs"] == 2, "it answers meanwhile"
        assert _begun(parent, run.run_id) == []
    assert not thread.is_alive()
    assert parent.end_of(run.run_id) is DagsterRunStatus.SUCCESS
    assert [parent.end_of(run_id) for run_id in before] == [DagsterRunStatus.SUCCESS] * 2
    [began] = [entry.timestamp for entry in parent.instance.all_logs(run.run_id) if _is(entry, "PIPELINE_START")]
    ended = [
        entry.timestamp for one in before for entry in parent.instance.all_logs(one) if _is(entry, "PIPELINE_SUCCESS")
    ]
    assert began > min(ended)


def _is(entry: object, kind: str) -> bool:
    event = getattr(entry, "dagster_event", None)
    return event is not None and event.event_type_value == kind


def test_a_waiting_run_is_cancelled_and_never_starts(parent: World) -> None:
    before = [_launch(parent, 0.3) for _ in range(2)]
    run = parent.create("in_process", _config(0.0))
    with _launching(parent, run.run_id) as thread:
        wait_for(lambda: parent.status(run.run_id) is DagsterRunStatus.STARTING, 10)
        thread.join(0.3)
        assert parent.instance.run_launcher.terminate(run.run_id)
    assert parent.status(run.run_id) is DagsterRunStatus.CANCELED
    assert [parent.end_of(run_id) for run_id in before] == [DagsterRunStatus.SUCCESS] * 2
    assert _begun(parent, run.run_id) == []


def test_who_waits_too_long_is_told_why(parent: World) -> None:
    before = [_launch(parent, 0.4) for _ in range(2)]
    run = parent.create("in_process", _config(0.0))
    assert parent.context is not None
    launcher = WarmRunLauncher(str(parent.meeting.folder), wait_seconds=1)
    launcher.register_instance(parent.instance)
    with pytest.raises(DagsterLaunchFailedError, match="as many runs execute as it allows"):
        launcher.launch_run(LaunchRunContext(run, parent.context.create_request_context()))
    assert [parent.end_of(run_id) for run_id in before] == [DagsterRunStatus.SUCCESS] * 2
    wait_for(lambda: (parent.ping() or {})["runs"] == 0, 10)
    assert _begun(parent, run.run_id) == [], "nobody waits for it any more"


def _killed_in(world: World, step: str, job: str = "forked") -> str:
    """Launch a run and kill its process while a step runs; monitoring is to resume it."""
    run_id = _launch(world, 0.5, job)
    wait_for(lambda: step in _begun(world, run_id), 20, lambda: world.log)
    worker = world.meeting.workers.of(run_id)
    assert worker is not None
    assert worker.process.signal(signal.SIGKILL)
    wait_for(lambda: world.meeting.workers.of(run_id) is None, 20, lambda: world.log)
    return run_id


def _monitor(world: World) -> None:
    """Do what the daemon does at each of its looks."""
    assert world.context is not None
    assert [error for error in execute_run_monitoring_iteration(world.context, logging.getLogger()) if error] == []


def test_a_killed_run_is_resumed_by_run_monitoring(parent: World) -> None:
    run_id = _killed_in(parent, "left")
    assert parent.status(run_id) is DagsterRunStatus.STARTED
    assert any("SIGKILL" in message and "resumes it" in message for message in parent.messages(run_id))
    _monitor(parent)
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    assert parent.events(run_id, "PIPELINE_START") == 1
    assert parent.events(run_id, "PIPELINE_SUCCESS") == 1
    begun = _begun(parent, run_id)
    assert set(begun) == set(STEPS)
    assert begun.count("first") == 1, "what was done is not done again"


def test_a_run_is_not_resumed_more_often_than_it_may_be(parent: World) -> None:
    run_id = _killed_in(parent, "first")
    _monitor(parent)
    wait_for(lambda: _begun(parent, run_id).count("first") == 2, 20, lambda: parent.log)
    worker = parent.meeting.workers.of(run_id)
    assert worker is not None
    assert worker.process.signal(signal.SIGKILL)
    assert parent.end_of(run_id) is DagsterRunStatus.FAILURE
    assert parent.events(run_id, "PIPELINE_FAILURE") == 1


@pytest.mark.parametrize("attempts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_while_the_database_is_away_runs_go_on_and_ends_are_kept(
    parent: World, postgres_env: dict[str, str], attempts: int
) -> None:
    """The process that stores an end tries for most of a minute, and is followed by another one."""
    url = postgres_env["POSTGRES_URL"]
    killed, other = _launch(parent, 0.5), _launch(parent, 0.5)
    run = parent.instance.get_run_by_id(killed)
    assert run is not None
    parent.instance.report_engine_event(RESUME_RUN_LOG_MESSAGE, run)  # as if it had been resumed already
    wait_for(lambda: bool(_begun(parent, killed) and _begun(parent, other)), 20, lambda: parent.log)
    worker = parent.meeting.workers.of(killed)
    assert worker is not None
    execute(url, f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS false")
    try:
        execute(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{DATABASE}'")  # noqa: S608
        assert worker.process.signal(signal.SIGKILL)
        wait_for(lambda: parent.log.count(f"run {killed}: ") == attempts, 120, lambda: parent.log)
        time.sleep(0.5)
        assert killed in {one.run_id for one in parent.meeting.workers}, "it is not forgotten"
    finally:
        execute(url, f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS true")
    assert parent.end_of(killed, 60) is DagsterRunStatus.FAILURE
    assert any("SIGKILL" in message for message in parent.messages(killed))
    if attempts > 1:  # the other one could not wait for so long: it is to be resumed
        wait_for(lambda: parent.meeting.workers.of(other) is None, 120, lambda: parent.log)
        assert parent.status(other) is DagsterRunStatus.STARTED
        _monitor(parent)
    assert parent.end_of(other) is DagsterRunStatus.SUCCESS


@pytest.mark.parametrize("whose", ["code", "instance"])
def test_runs_of_others_are_refused(parent: World, whose: str) -> None:
    question = {"ask": "launch", "run_id": "anybodys", "instance": "another", "code": "another"}
    if whose == "code":
        from clinical_orchestration.execution.origins import instance_mark

        question["instance"] = instance_mark(parent.instance)
    answer = parent.meeting.ask(question, 10)
    assert ("instance" in answer["foreign"]) is (whose == "instance")
    assert parent.meeting.workers.of("anybodys") is None


@pytest.mark.parametrize("other", ["module", "python"])
def test_a_run_of_other_code_is_left_to_the_code_server(
    parent: World, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    left: list[str] = []
    monkeypatch.setattr(DefaultRunLauncher, "launch_run", lambda _, context: left.append(context.dagster_run.run_id))
    run = parent.create("in_process", _config(0.0))
    assert run.job_code_origin is not None
    code = run.job_code_origin.repository_origin
    if other == "python":
        code = code._replace(executable_path="/another/python")
    else:
        code = code._replace(code_pointer=ModuleCodePointer("another", "defs", None))
    run = run._replace(job_code_origin=run.job_code_origin._replace(repository_origin=code))
    assert parent.context is not None
    parent.instance.run_launcher.launch_run(LaunchRunContext(run, parent.context.create_request_context()))
    assert left == [run.run_id]
    assert parent.meeting.workers.of(run.run_id) is None
    [message] = parent.messages(run.run_id)
    assert "Not started warm: the run's code location is not the one that is loaded" in message


def test_without_a_parent_no_run_is_resumed(parent: World) -> None:
    run_id = _launch(parent, 5.0)
    wait_for(lambda: _begun(parent, run_id) == ["first"], 20, lambda: parent.log)
    worker = parent.meeting.workers.of(run_id)
    assert worker is not None
    parent.kill_parent()
    assert worker.process.signal(signal.SIGKILL)
    wait_for(lambda: not worker.process.alive and parent.ping() is None, 5)
    assert parent.context is not None
    with pytest.raises(DagsterLaunchFailedError, match="Start the warm parent"):
        parent.instance.resume_run(run_id, parent.context.create_request_context(), 1)
    parent.start_parent()
    assert parent.end_of(run_id) is DagsterRunStatus.FAILURE
