"""Runs while processes are killed at random: each ends in its true state, none runs twice, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from dagster import DagsterRunStatus

from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.warm_world import World, wait_for, warm_world


@pytest.fixture
def world(postgres_env: dict[str, str], tmp_path: Path) -> Iterator[World]:
    database = new_database(postgres_env["POSTGRES_URL"], f"kills_{os.getpid()}_{time.time_ns()}")
    with warm_world(database, tmp_path / "home") as made:
        yield made


def _kill(world: World, victim: str, chance: random.Random) -> None:
    if victim == "parent":
        world.kill_parent()
        world.start_parent(ready=False)
    elif victim == "version":
        answer = world.ping()
        if answer is not None:
            with suppress(ProcessLookupError):
                os.kill(answer["pid"], signal.SIGKILL)
    else:
        workers = list(world.meeting.workers)
        if workers:
            chance.choice(workers).process.signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("runs", "seed"), [pytest.param(12, 6), pytest.param(200, 7, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_every_run_ends_truly(world: World, tmp_path: Path, runs: int, seed: int) -> None:
    chance = random.Random(seed)
    world.start_parent()
    launched: dict[str, Path] = {}
    for number in range(runs):
        # the code server could start runs as well; here each waits for the parent
        wait_for(lambda: world.ping() is not None, 90, lambda: world.log)
        mark = tmp_path / f"mark{number}"
        seconds = chance.uniform(0.1, 1.5)
        launched[world.launch("waiting", {"wait": {"config": {"seconds": seconds, "mark": str(mark)}}})] = mark
        time.sleep(chance.uniform(0.0, 0.2))
        if chance.random() < 0.5:
            _kill(world, chance.choices(["worker", "version", "parent"], [8, 1, 1])[0], chance)
    wait_for(lambda: world.ping() is not None, 90, lambda: world.log)
    for run_id in launched:
        status = world.end_of(run_id, 90)
        starts, ends = world.events(run_id, "STEP_START"), world.events(run_id, "STEP_SUCCESS")
        assert starts <= 1, "it ran twice"
        assert status in (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE)
        if status is DagsterRunStatus.SUCCESS:
            assert ends == 1
            assert world.events(run_id, "PIPELINE_FAILURE") == 0
        else:
            assert world.events(run_id, "PIPELINE_SUCCESS") == 0
            assert world.events(run_id, "PIPELINE_FAILURE") == 1
    world.stop_parent()
    wait_for(lambda: world.processes() == [], 10, lambda: str([process.cmdline() for process in world.processes()]))
    assert not any(psutil.pid_exists(int(mark.read_text())) for mark in launched.values() if mark.exists())
    assert [path.name for path in world.meeting.folder.iterdir() if path.suffix == ".sock"] == []
    assert os.listdir(world.meeting.folder / "runs") == []
