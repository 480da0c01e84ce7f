"""The private parts of Dagster that starting runs relies on: a version that changes them fails here, not in a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._core.instance import DagsterInstance
from dagster._core.launcher.base import RunLauncher
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._daemon.controller import create_daemon_of_type, daemon_controller_from_instance
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster._grpc.server import LoadedRepositories

BODY = ["run_id", "instance", "write_stream_fn", "set_exit_code_on_failure"]


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (_execute_run_command_body, BODY),
        (_resume_run_command_body, BODY),
        (QueuedRunCoordinatorDaemon._get_runs_to_dequeue, [
            "self", "instance", "concurrency_config", "fixed_iteration_time",
        ]),
        (QueuedRunCoordinatorDaemon._dequeue_run, [
            "self", "instance", "workspace", "run", "concurrency_config", "fixed_iteration_time",
        ]),
        (QueuedRunCoordinatorDaemon.run_iteration, ["self", "workspace_process_context", "fixed_iteration_time"]),
        (QueuedRunCoordinator.submit_run, ["self", "context"]),
        (QueuedRunCoordinator.cancel_run, ["self", "run_id"]),
        (create_daemon_of_type, ["daemon_type", "instance"]),
        (RunLauncher.launch_run, ["self", "context"]),
        (RunLauncher.resume_run, ["self", "context"]),
        (RunLauncher.check_run_worker_health, ["self", "run"]),
        (DefaultRunLauncher.terminate, ["self", "run_id"]),
        (DagsterInstance.report_run_failed, ["self", "dagster_run", "message", "job_failure_data"]),
        (DagsterInstance.report_run_canceled, ["self", "dagster_run", "message"]),
        (DagsterInstance.count_resume_run_attempts, ["self", "run_id"]),
        (LoadedRepositories.__init__, [
            "self", "loadable_target_origin", "container_image", "entry_point", "container_context", "defs_state_info",
            "code_location_name",
        ]),
    ],
)  # fmt: skip
def test_dagster_is_as_it_was(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_the_daemon_takes_its_parts_from_outside() -> None:
    assert "gen_daemons" in inspect.signature(daemon_controller_from_instance).parameters


def test_the_queue_is_emptied_by_these_two_steps() -> None:
    source = inspect.getsource(QueuedRunCoordinatorDaemon.run_iteration)
    assert "_get_runs_to_dequeue(" in source
    assert "_dequeue_runs_iter(" in source
