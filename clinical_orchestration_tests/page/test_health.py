"""``/health``: the truth table, the shape, the time limits."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from clinical_orchestration.page.bounded import Bounded
from clinical_orchestration.page.health import Health, HealthMonitor, daemon_is_healthy
from clinical_orchestration.page.stack_state import Service, process_alive

NOW = 1_800_000_000.0
ALIVE = Service("daemon", "Dagster daemon", 5, "healthy", pid=os.getpid(), started_at=NOW - 3600)
DEAD = Service("daemon", "Dagster daemon", 5, "healthy", pid=2**22 - 3, started_at=NOW - 3600)
RESTARTED = Service("daemon", "Dagster daemon", 5, "starting", pid=os.getpid(), started_at=NOW - 2)


@pytest.mark.parametrize(
    ("heartbeat", "process", "healthy"),
    [
        (NOW - 30, None, True),
        (NOW - 30, ALIVE, True),
        (NOW - 89, ALIVE, True),  # it beat 29 s before it woke up, and sleeps for a minute again
        (NOW - 30, DEAD, False),  # within seconds, long before the heartbeat gets old
        (NOW - 30, RESTARTED, False),  # the heartbeat is the earlier process's
        (NOW - 1, RESTARTED, True),
        (NOW - 200, ALIVE, False),  # a process that hangs
        (None, ALIVE, False),
        (None, None, False),
    ],
)
def test_a_daemon_is_healthy_by_heartbeat_and_process(
    heartbeat: float | None, process: Service | None, healthy: bool
) -> None:
    assert daemon_is_healthy(heartbeat, NOW, process) is healthy


def _check(heartbeats: Mapping[str, float] | Exception, code_server: bool, process: Service | None = ALIVE) -> Health:
    def read() -> Mapping[str, float]:
        if isinstance(heartbeats, Exception):
            raise heartbeats
        return heartbeats

    def ping() -> None:
        if not code_server:
            raise ConnectionError("refused")

    return asyncio.run(HealthMonitor(read, ping, lambda: process, clock=lambda: NOW).check())


BOTH = {"SCHEDULER": NOW - 10, "SENSOR": NOW - 5}


@pytest.mark.parametrize(
    ("heartbeats", "code_server", "process", "expected"),
    [
        (BOTH, True, ALIVE, (True, True, True, True)),
        (BOTH, False, ALIVE, (True, True, True, False)),
        (BOTH, True, DEAD, (True, False, False, True)),
        ({"SENSOR": NOW - 5}, True, ALIVE, (True, False, True, True)),
        ({"SCHEDULER": NOW - 5}, True, ALIVE, (True, True, False, True)),
        ({}, True, None, (True, False, False, True)),
        (ConnectionError("refused"), True, ALIVE, (False, False, False, True)),
        (ConnectionError("refused"), False, DEAD, (False, False, False, False)),
    ],
)
def test_truth_table(
    heartbeats: Mapping[str, float] | Exception,
    code_server: bool,
    process: Service | None,
    expected: tuple[bool, bool, bool, bool],
) -> None:
    health = _check(heartbeats, code_server, process)
    assert (health.metadatabase, health.scheduler, health.triggerer, health.dag_processor) == expected
    assert health.healthy is all(expected)


def test_shape_is_that_of_airflow() -> None:
    assert _check(BOTH, True).as_airflow() == {
        "metadatabase": {"status": "healthy"},
        "scheduler": {"status": "healthy", "latest_scheduler_heartbeat": "2027-01-15T07:59:50+00:00"},
        "triggerer": {"status": "healthy", "latest_triggerer_heartbeat": "2027-01-15T07:59:55+00:00"},
        "dag_processor": {"status": "healthy", "latest_dag_processor_heartbeat": "2027-01-15T08:00:00+00:00"},
    }


def test_a_failed_database_keeps_the_latest_known_heartbeats() -> None:
    answers: list[Mapping[str, float]] = [BOTH]

    def read() -> Mapping[str, float]:
        if not answers:
            raise ConnectionError("refused")
        return answers.pop()

    clock = [NOW]
    monitor = HealthMonitor(read, lambda: None, lambda: ALIVE, clock=lambda: clock[0])

    async def twice() -> Health:
        await monitor.check()
        await asyncio.sleep(0.6)  # longer than an answer counts as new
        return await monitor.check()

    health = asyncio.run(twice())
    assert not health.metadatabase
    assert not health.scheduler
    assert health.scheduler_heartbeat is not None


def test_services_that_hang_are_unhealthy_within_the_limit() -> None:
    release = threading.Event()

    def hang() -> dict[str, float]:
        release.wait(20)
        return {}

    def hang_too() -> None:
        release.wait(20)

    began = time.monotonic()
    health = asyncio.run(HealthMonitor(hang, hang_too, lambda: None, limit_seconds=0.2).check())
    release.set()
    assert time.monotonic() - began < 2
    assert not health.metadatabase
    assert not health.dag_processor


def test_calls_share_one_answer_and_a_hanging_call_holds_one_thread() -> None:
    calls = []
    release = threading.Event()

    def slow() -> int:
        calls.append(1)
        release.wait(20)
        return 7

    async def scenario() -> list[object]:
        bounded = Bounded(slow, limit_seconds=0.1)
        timed_out = await asyncio.gather(*(bounded() for _ in range(20)), return_exceptions=True)
        release.set()
        return [*timed_out, await Bounded(slow, limit_seconds=5)()]

    *timed_out, answer = asyncio.run(scenario())
    assert all(isinstance(error, TimeoutError) for error in timed_out)
    assert answer == 7
    assert len(calls) == 2


def test_a_killed_process_is_seen_at_once_even_as_a_zombie() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert process_alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 5
    while process_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_alive(process.pid)  # nobody has waited for it yet
    process.wait()


@pytest.mark.parametrize(
    ("service", "shown"),
    [
        (ALIVE, "healthy"),
        (DEAD, "unhealthy"),
        (RESTARTED, "starting"),
        (replace(RESTARTED, restarts=1), "unhealthy"),
        (replace(ALIVE, restarts=1), "healthy"),
    ],
)
def test_a_service_that_failed_shows_until_its_successor_answers(service: Service, shown: str) -> None:
    assert service.shown_state == shown
