"""A code location held in this process, and Dagster's own daemon iterations run on it by hand."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.test_utils import freeze_time, instance_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._scheduler.scheduler import launch_scheduled_runs

LOGGER = logging.getLogger("clinical_orchestration_tests.daemon")
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def workspace(home: Path, module: str) -> Iterator[WorkspaceProcessContext]:
    """Give the workspace of a module over an instance in `home`; runs are queued and nothing takes them out."""
    overrides = {"run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"}}
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        instance = stack.enter_context(instance_for_test(temp_dir=str(home), overrides=overrides))
        origin = InProcessCodeLocationOrigin(
            LoadableTargetOrigin(executable_path=sys.executable, module_name=module, working_directory=str(ROOT)),
            location_name="here",
        )
        yield stack.enter_context(WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)))


def schedule_iteration(context: WorkspaceProcessContext, now: datetime, crash: dict[str, str] | None = None) -> None:
    """Run one iteration of the scheduler at `now`; `crash` kills this process at a point, by schedule name."""
    flags = {name: {point: int(signal.SIGKILL)} for name, point in (crash or {}).items()}
    with freeze_time(now):
        list(launch_scheduled_runs(context, LOGGER, now, iteration_times={}, debug_crash_flags=flags))


def sensor_iteration(context: WorkspaceProcessContext, now: datetime, crash: dict[str, str] | None = None) -> None:
    """Run one iteration of the sensor daemon, as :func:`schedule_iteration`."""
    flags = {name: {point: int(signal.SIGKILL)} for name, point in (crash or {}).items()}
    with freeze_time(now):
        list(
            execute_sensor_iteration(
                context, LOGGER, threadpool_executor=None, submit_threadpool_executor=None, debug_crash_flags=flags
            )
        )


def in_a_process_that_may_die(work: Callable[[], None]) -> bool:
    """Do `work` in a forked process; return whether it was killed. What it wrote to its files stays."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            logging.exception("the forked daemon failed")
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def finish_runs(instance: dg.DagsterInstance) -> None:
    """End every queued run."""
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED])):
        instance.report_run_canceled(run)


def minutes(start: datetime, count: int, step: int = 1) -> Iterator[datetime]:
    """Yield times from `start`, `step` minutes apart."""
    for number in range(count):
        yield start + timedelta(minutes=number * step)
