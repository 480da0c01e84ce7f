"""Dagster's scheduler and sensor daemon on the real definitions with a moved clock, and on small ones when killed."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.storage.tags import SCHEDULED_EXECUTION_TIME_TAG
from dagster._core.test_utils import create_run_for_test

from clinical_orchestration.alerts.policy import Rules
from clinical_orchestration.contract import PIPELINES
from clinical_orchestration.defs.sensors import SENSORS, sensors
from clinical_orchestration.defs.sensors.requests import Patience
from clinical_orchestration.stores import alerts
from clinical_orchestration_tests.sensors.support import (
    finish_runs,
    in_a_process_that_may_die,
    minutes,
    schedule_iteration,
    sensor_iteration,
    workspace,
)
from clinical_orchestration_tests.sensors.tiny_location import WORLD

SEEDS = int(os.environ.get("CLINICAL_TEST_SEEDS", "2"))
TINY = "clinical_orchestration_tests.sensors.tiny_location"
SATURDAY = datetime(2026, 3, 7, 22, 30, tzinfo=UTC)
EXPECTED = {
    "clinical_data_pipeline": {0, 6, 12, 18},
    "model_monitoring": set(range(0, 24, 2)),
    "data_quality_monitoring": {0, 4, 8, 12, 16, 20},
}
SCHEDULE_POINTS = ("TICK_CREATED", "TICK_HELD", "RUN_CREATED", "RUN_LAUNCHED", "RUN_ADDED", "TICK_SUCCESS")
SENSOR_POINTS = ("TICK_CREATED", "TICK_HELD", "RUN_IDS_RESERVED", "RUN_CREATED", "RUN_LAUNCHED")


def ticks(instance: dg.DagsterInstance) -> dict[str, Counter[datetime]]:
    """Count the runs of each job by the time they were scheduled for."""
    found: dict[str, Counter[datetime]] = {}
    for run in instance.get_runs():
        scheduled = run.tags.get(SCHEDULED_EXECUTION_TIME_TAG)
        if scheduled:
            found.setdefault(run.job_name, Counter())[datetime.fromisoformat(scheduled).astimezone(UTC)] += 1
    return found


def test_the_schedules_fire_at_the_times_of_the_contract(tmp_path: Path) -> None:
    """From Saturday evening, over Sunday midnight when the weekly one fires, to Monday."""
    end = SATURDAY + timedelta(hours=26)
    with workspace(tmp_path, "clinical_orchestration.definitions") as context:
        for now in (SATURDAY, *minutes(SATURDAY + timedelta(minutes=30), 26, 60), end):
            schedule_iteration(context, now)
        found = ticks(context.instance)
    for name, hours in EXPECTED.items():
        wanted = {
            moment
            for day in (8, 9)
            for hour in hours
            if SATURDAY < (moment := datetime(2026, 3, day, hour, tzinfo=UTC)) <= end
        }
        assert set(found[name]) == wanted, name
        assert set(found[name].values()) == {1}, name
    assert found["scheduled_retraining"] == Counter([datetime(2026, 3, 8, tzinfo=UTC)])
    assert set(found) == {*EXPECTED, "scheduled_retraining"}, "feature_backfill has no schedule"


def test_the_daemon_evaluates_every_sensor_of_the_real_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every service absent: each tick ends without an error, a failed run becomes an alert, nothing starts."""
    for name in vars(sensors):
        if name.endswith("_patience"):
            monkeypatch.setattr(sensors, name, Patience(1.0))
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    monkeypatch.setattr(alerts, "_MEMORY", memory := alerts.MemoryAlertStore())
    now = datetime.now(UTC)
    with workspace(tmp_path / "home", "clinical_orchestration.definitions") as context:
        (entry,) = context.create_request_context().get_code_location_entries().values()
        assert entry.code_location is not None, entry.load_error
        (repository,) = entry.code_location.get_repositories().values()
        mine = {sensor.name for sensor in SENSORS}
        remote = {sensor.name: sensor for sensor in repository.get_sensors()}
        for name in set(remote) - mine:
            context.instance.stop_sensor(remote[name].get_remote_origin_id(), remote[name].selector_id, remote[name])
        sensor_iteration(context, now)
        config = {"resources": {"pipeline": {"config": {"trial": "simulated"}}}}
        origin = repository.get_full_job("clinical_data_pipeline").get_remote_origin()
        failed = create_run_for_test(
            context.instance, "clinical_data_pipeline", run_config=config, remote_job_origin=origin
        )
        context.instance.report_run_failed(failed, "the worker was killed")
        sensor_iteration(context, now + timedelta(seconds=61))
        found = {
            name: context.instance.get_ticks(remote[name].get_remote_origin_id(), remote[name].selector_id, limit=5)
            for name in mine
        }
        runs = context.instance.get_runs()
    for name, both in found.items():
        assert len(both) == 2, name
        assert {tick.status for tick in both} <= {TickStatus.SKIPPED, TickStatus.SUCCESS}, (name, both)
    assert [run.run_id for run in runs] == [failed.run_id], "nothing was started"
    (alert,) = memory.view(datetime.now(UTC), Rules()).open
    assert alert.alert.key == "run:clinical_data_pipeline:simulated"
    assert "the worker was killed" in alert.alert.what


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_scheduler_that_is_killed_skips_no_tick_and_doubles_none(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    names = [f"{pipeline.name}_schedule" for pipeline in PIPELINES if pipeline.cron]
    with workspace(tmp_path, TINY) as context:
        schedule_iteration(context, SATURDAY)
        kills = 0
        now = SATURDAY
        while now < SATURDAY + timedelta(hours=10):
            now += timedelta(minutes=chance.choice([1, 20, 45]))
            crash = {chance.choice(names): chance.choice(SCHEDULE_POINTS)} if chance.random() < 0.7 else {}
            kills += in_a_process_that_may_die(lambda now=now, crash=crash: schedule_iteration(context, now, crash))  # type: ignore[misc]
        now += timedelta(minutes=1)
        schedule_iteration(context, now)
        found = ticks(context.instance)
    assert kills > 0
    for pipeline in PIPELINES:
        if pipeline.cron is None:
            assert pipeline.name not in found
            continue
        hours = EXPECTED.get(pipeline.name, {0})
        wanted = {
            moment
            for hour in hours
            if SATURDAY < (moment := datetime(2026, 3, 8, hour, tzinfo=UTC)) <= now
        }  # fmt: skip
        assert found.get(pipeline.name, Counter()) == Counter(wanted), pipeline.name


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_sensor_daemon_that_is_killed_starts_one_run_for_each_event(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    world = tmp_path / "world.json"
    world.write_text("0", encoding="utf-8")
    monkeypatch.setenv(WORLD, str(world))
    count, kills, now = 0, 0, SATURDAY
    lost = 0
    with workspace(tmp_path / "home", TINY) as context:
        (entry,) = context.create_request_context().get_code_location_entries().values()
        assert entry.code_location is not None, entry.load_error
        (repository,) = entry.code_location.get_repositories().values()
        (sensor,) = repository.get_sensors()
        for _ in range(16):
            before = context.instance.get_instigator_state(sensor.get_remote_origin_id(), sensor.selector_id)
            if chance.random() < 0.6:
                count += chance.randint(1, 5)
                world.write_text(json.dumps(count), encoding="utf-8")
            if chance.random() < 0.5:
                finish_runs(context.instance)
            now += timedelta(seconds=chance.choice([31, 60, 90]))
            crash = {"counting_sensor": chance.choice(SENSOR_POINTS)} if chance.random() < 0.6 else {}
            kills += in_a_process_that_may_die(lambda now=now, crash=crash: sensor_iteration(context, now, crash))  # type: ignore[misc]
            if before is not None and chance.random() < 0.3:
                # the run is stored, the cursor is not, and nothing is left of the tick to go on with
                context.instance.update_instigator_state(before)
                lost += 1
        for _ in range(4):
            finish_runs(context.instance)
            now += timedelta(seconds=31)
            sensor_iteration(context, now)
        runs = context.instance.get_runs()
    assert kills > 0
    assert lost > 0
    ranges = sorted(
        tuple(map(int, run.run_config["resources"]["pipeline"]["config"]["conf"]["range"].split("-"))) for run in runs
    )
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])], "an event was skipped or doubled"
    assert ranges[-1][1] == count
