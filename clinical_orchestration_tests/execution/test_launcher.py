"""Runs that a warm parent starts: with PostgreSQL, a code server and real processes."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dagster import DagsterRunStatus
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.warm_world import World, wait_for, warm_world


@pytest.fixture(scope="module")
def world(postgres_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    database = new_database(postgres_env["POSTGRES_URL"], "warm_launcher")
    with warm_world(database, tmp_path_factory.mktemp("warm")) as made:
        made.options = ["--cancel-seconds", "1.5", "--stop-seconds", "1.5"]
        yield made


@pytest.fixture
def parent(world: World) -> Iterator[World]:
    """The world with a parent that answers."""
    if world.ping() is None:
        world.stop_parent()
        world.start_parent()
    made = world.parent
    yield world
    if world.parent is made:  # the test did nothing to it
        assert made is not None
        assert made.poll() is None, "the parent ended"


def test_a_run_succeeds(parent: World) -> None:
    run_id = parent.launch("three_steps")
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    assert parent.events(run_id, "STEP_SUCCESS") == 3
    run = parent.instance.get_run_by_id(run_id)
    assert run is not None
    assert GRPC_INFO_TAG not in run.tags, "the code server had nothing to do with it"


def test_an_asset_is_materialized(parent: World) -> None:
    run_id = parent.launch("things")
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    assert parent.events(run_id, "ASSET_MATERIALIZATION") == 1
    assert parent.events(run_id, "ASSET_CHECK_EVALUATION") == 1


def test_a_child_does_nothing_again(parent: World) -> None:
    parent.end_of(parent.launch("three_steps"))
    run_id = parent.launch("looking")
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    [output] = [
        entry.dagster_event.step_output_data
        for entry in parent.instance.all_logs(run_id)
        if entry.dagster_event and entry.dagster_event.event_type_value == "STEP_OUTPUT"
    ]
    seen = {name: value.value for name, value in output.metadata.items()}
    assert seen["imported"] == []
    assert seen["compiled"] == 0
    assert seen["leads"]
    assert seen["oom"] == 300
    assert seen["threads"] == ["MainThread"]
    assert seen["interrupt"]


def test_children_draw_different_numbers(parent: World) -> None:
    drawn = set()
    for _ in range(2):
        run_id = parent.launch("looking")
        parent.end_of(run_id)
        drawn.update(
            entry.dagster_event.step_output_data.metadata["random"].value
            for entry in parent.instance.all_logs(run_id)
            if entry.dagster_event and entry.dagster_event.event_type_value == "STEP_OUTPUT"
        )
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [("SIGKILL", "SIGKILL"), ("segfault", "SIGSEGV"), ("exit", "exit status 3"), ("SIGABRT", "SIGABRT")],
)
def test_a_crash_fails_its_run_alone(parent: World, tmp_path: Path, how: str, said: str) -> None:
    other = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(tmp_path / "other")}}})
    run_id = parent.launch("dying", {"die": {"config": {"how": how, "mark": str(tmp_path / "mark")}}})
    wait_for(lambda: (tmp_path / "mark").exists() and (tmp_path / "mark").read_text() != "", 20)
    began = time.monotonic()
    assert parent.end_of(run_id) is DagsterRunStatus.FAILURE
    assert time.monotonic() - began < 2
    [message] = [message for message in parent.messages(run_id) if said in message]
    assert "before the run was finished" in message
    assert not psutil.pid_exists(int((tmp_path / "mark").read_text())), "what the step started was left behind"
    (tmp_path / "other.go").touch()
    assert parent.end_of(other) is DagsterRunStatus.SUCCESS


def test_a_cancelled_run_is_interrupted(parent: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run_id = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(mark)}}})
    wait_for(mark.exists, 20)
    run = parent.instance.get_run_by_id(run_id)
    assert run is not None
    health = parent.instance.run_launcher.check_run_worker_health(run)
    assert health.status is WorkerStatus.RUNNING
    assert parent.instance.run_launcher.terminate(run_id)
    assert parent.end_of(run_id) is DagsterRunStatus.CANCELED
    assert not parent.instance.run_launcher.terminate(run_id), "it has ended"
    assert parent.instance.run_launcher.check_run_worker_health(run).status is WorkerStatus.NOT_FOUND


def test_a_stubborn_run_is_killed_and_cancelled(parent: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run_id = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "stubborn": True, "mark": str(mark)}}})
    wait_for(mark.exists, 20)
    assert parent.instance.run_launcher.terminate(run_id)
    assert parent.status(run_id) is DagsterRunStatus.CANCELING, "cancelled only once nothing of it runs"
    assert parent.end_of(run_id) is DagsterRunStatus.CANCELED
    assert any("SIGKILL" in message for message in parent.messages(run_id))


def test_a_run_without_a_process_is_cancelled_at_once(parent: World) -> None:
    run = parent.create("three_steps")
    assert parent.instance.run_launcher.terminate(run.run_id)
    assert parent.status(run.run_id) is DagsterRunStatus.CANCELED


def test_a_run_gets_one_process_however_often_it_is_launched(parent: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run_id = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(mark)}}})
    assert parent.context is not None
    parent.instance.launch_run(run_id, parent.context.create_request_context())
    (tmp_path / "mark.go").touch()
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    assert parent.events(run_id, "STEP_START") == 1


def test_a_killed_spare_is_replaced(parent: World) -> None:
    wait_for(lambda: (parent.ping() or {})["spares"] == 2, 20)
    pid = (parent.ping() or {})["pid"]
    for spare in psutil.Process(pid).children():
        spare.kill()
    run_id = parent.launch("three_steps")
    assert parent.end_of(run_id) is DagsterRunStatus.SUCCESS
    wait_for(lambda: (parent.ping() or {})["spares"] == 2, 20)


def test_only_this_user_may_ask(parent: World) -> None:
    folder = parent.meeting.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "runs.sock").stat().st_mode) == 0o600


def test_an_idle_parent_costs_next_to_nothing(parent: World) -> None:
    pid = (parent.ping() or {})["pid"]
    version = psutil.Process(pid)
    before = sum(version.cpu_times()[:2])
    time.sleep(2)
    assert sum(version.cpu_times()[:2]) - before < 0.05
    assert version.memory_full_info().uss < 400e6


def test_runs_live_on_when_the_parent_is_killed(parent: World, tmp_path: Path) -> None:
    lives, dies = tmp_path / "lives", tmp_path / "dies"
    living = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(lives)}}})
    dying = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(dies)}}})
    cancelled = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(tmp_path / "mark")}}})
    wait_for(lambda: lives.exists() and dies.exists() and (tmp_path / "mark").exists(), 20)
    parent.kill_parent()
    wait_for(lambda: parent.ping() is None, 5)
    os.kill(int(dies.read_text()), signal.SIGKILL)
    parent.start_parent()
    assert parent.end_of(dying) is DagsterRunStatus.FAILURE
    assert any("restarted" in message for message in parent.messages(dying))
    assert parent.instance.run_launcher.terminate(cancelled)
    assert parent.end_of(cancelled) is DagsterRunStatus.CANCELED
    (tmp_path / "lives.go").touch()
    assert parent.end_of(living) is DagsterRunStatus.SUCCESS


def test_a_killed_version_is_replaced_and_its_runs_adopted(parent: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run_id = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(mark)}}})
    wait_for(mark.exists, 20)
    pid = (parent.ping() or {})["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: (parent.ping() or {"pid": pid})["pid"] != pid, 40, lambda: parent.log)
    wait_for(lambda: (parent.ping() or {})["runs"] == 1, 5)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    assert parent.end_of(run_id) is DagsterRunStatus.FAILURE


def test_a_stop_ends_runs_and_leaves_nothing(parent: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run_id = parent.launch("waiting", {"wait": {"config": {"seconds": 60.0, "mark": str(mark)}}})
    wait_for(mark.exists, 20)
    parent.stop_parent()
    assert parent.status(run_id) is DagsterRunStatus.FAILURE
    assert list(parent.meeting.workers) == []
    assert [path.name for path in parent.meeting.folder.iterdir()] == ["runs"]
    wait_for(lambda: parent.processes() == [], 5)


def test_without_a_parent_the_code_server_starts_runs(world: World) -> None:
    world.stop_parent()  # if the test before has not
    run_id = world.launch("three_steps")
    wait_for(lambda: world.status(run_id) is DagsterRunStatus.SUCCESS, 60)
    assert [message for message in world.messages(run_id) if "Not started warm: no answer at" in message]
    run = world.instance.get_run_by_id(run_id)
    assert run is not None
    assert GRPC_INFO_TAG in run.tags
