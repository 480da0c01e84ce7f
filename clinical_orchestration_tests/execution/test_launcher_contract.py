"""The private parts of Dagster that starting runs relies on: a version that changes them fails here, not in a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._config import process_config
from dagster._core.definitions.assets.job.asset_layer import AssetLayer
from dagster._core.execution.api import execute_plan_iterator
from dagster._core.execution.context_creation_job import create_context_free_log_manager
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.executor.base import Executor
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.executor.init import InitExecutorContext
from dagster._core.executor.multiprocess import MultiprocessExecutor
from dagster._core.executor.step_delegating import StepDelegatingExecutor, StepHandler, StepHandlerContext
from dagster._core.instance import DagsterInstance
from dagster._core.launcher.base import RunLauncher
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._core.storage.event_log import EventLogStorage
from dagster._core.storage.runs import RunStorage
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._daemon.controller import create_daemon_of_type, daemon_controller_from_instance
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster._grpc.server import LoadedRepositories
from dagster._grpc.types import ExecuteStepArgs
from dagster._utils import interrupts
from dagster_k8s.container_context import K8sContainerContext

from clinical_orchestration.execution.isolation import _NoSettings

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
        (DagsterInstance.all_logs, ["self", "run_id", "of_type"]),
        (RunStorage.handle_run_event, ["self", "run_id", "event", "update_timestamp"]),
        (LoadedRepositories.__init__, [
            "self", "loadable_target_origin", "container_image", "entry_point", "container_context", "defs_state_info",
            "code_location_name",
        ]),
        (execute_plan_iterator, [
            "execution_plan", "job", "dagster_run", "instance", "retry_mode", "run_config", "step_dependency_config",
        ]),
        (ActiveExecution.__init__, [
            "self", "execution_plan", "retry_mode", "sort_key_fn", "max_concurrent", "tag_concurrency_limits",
            "instance_concurrency_context", "step_dependency_config",
        ]),
        (ActiveExecution.get_steps_to_execute, ["self", "limit"]),
        (ActiveExecution.get_step_by_key, ["self", "step_key"]),
        (ActiveExecution.get_known_state, ["self"]),
        (ActiveExecution.handle_event, ["self", "dagster_event"]),
        (ActiveExecution.verify_complete, ["self", "job_context", "step_key"]),
        (ActiveExecution.plan_events_iterator, ["self", "job_context"]),
        (ActiveExecution.concurrency_event_iterator, ["self", "plan_context"]),
        (ActiveExecution.mark_up_for_retry, ["self", "step_key", "at_time"]),
        (ActiveExecution.mark_interrupted, ["self"]),
        (ActiveExecution.check_for_interrupts, ["self"]),
        (ActiveExecution.sleep_interval, ["self"]),
        (InstanceConcurrencyContext.__init__, ["self", "instance", "dagster_run"]),
        (InstanceConcurrencyContext.has_pending_claims, ["self"]),
        (ExecutionPlan.build_subset_plan, [
            "self", "step_keys_to_execute", "job_def", "resolved_run_config", "step_output_versions",
        ]),
        (ResolvedRunConfig.build, ["job_def", "run_config"]),
        (create_context_free_log_manager, ["instance", "dagster_run"]),
        (interrupts.capture_interrupts, []),
        (interrupts.pop_captured_interrupt, []),
        (Executor.log_failure_or_retry_event_after_error, ["self", "step_context", "err_info", "known_state"]),
        (InProcessExecutor.__init__, ["self", "retries", "step_dependency_config", "marker_to_close"]),
        (MultiprocessExecutor.__init__, [
            "self", "retries", "max_concurrent", "tag_concurrency_limits", "start_method",
            "explicit_forkserver_preload", "step_dependency_config",
        ]),
        (DagsterInstance.handle_new_event, ["self", "event", "batch_metadata"]),
        (EventLogStorage.get_records_for_run, ["self", "run_id", "cursor", "of_type", "limit", "ascending"]),
        (EventLogStorage.store_event_batch, ["self", "events"]),
        (AssetLayer.get_selected_entity_keys_for_node, ["self", "node_handle"]),
        (process_config, ["config_type", "config_dict"]),
        (InitExecutorContext.__new__, ["cls", "job", "executor_def", "executor_config", "instance"]),
        (StepHandlerContext.__init__, [
            "self", "instance", "plan_context", "steps", "execute_step_args", "dagster_run",
        ]),
        (StepHandler.launch_step, ["self", "step_handler_context"]),
        (StepHandler.check_step_health, ["self", "step_handler_context"]),
        (StepHandler.terminate_step, ["self", "step_handler_context"]),
        (ExecuteStepArgs.__new__, [
            "cls", "job_origin", "run_id", "step_keys_to_execute", "instance_ref", "retry_mode", "known_state",
            "should_verify_step", "print_serialized_events",
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


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (DagsterInstance, "self._event_storage = "),
        (ActiveExecution, "self._in_flight: "),
        (StepDelegatingExecutor, "self._step_handler = "),
    ],
)
def test_what_steps_replace_or_read_is_where_it_was(owner: type, attribute: str) -> None:
    assert attribute in inspect.getsource(owner.__init__)  # type: ignore[misc]


def test_a_handler_of_pods_asks_a_launcher_for_what_it_did() -> None:
    assert "if run_launcher:" in inspect.getsource(K8sContainerContext.create_for_run)
    asked = re.findall(r"run_launcher\.(\w+)", inspect.getsource(K8sContainerContext.get_k8s_job_config))
    assert asked
    assert all(hasattr(_NoSettings, name) for name in asked)
