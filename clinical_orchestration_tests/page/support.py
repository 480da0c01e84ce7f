"""Helpers of the page's tests."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dagster import DagsterInstance
from dagster._core.test_utils import instance_for_test
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

if TYPE_CHECKING:
    from dagster._core.workspace.load_target import WorkspaceLoadTarget

TINY = "clinical_orchestration_tests.page.tiny_definitions"


def open_tiny_workspace(home: Path, stack: ExitStack) -> WorkspaceProcessContext:
    """Open a temporary instance whose runs execute at once, in this process, and load the tiny definitions."""
    instance: DagsterInstance = stack.enter_context(
        instance_for_test(
            temp_dir=str(home),
            overrides={
                "run_launcher": {
                    "module": "dagster._core.launcher.sync_in_memory_run_launcher",
                    "class": "SyncInMemoryRunLauncher",
                },
                "run_coordinator": {
                    "module": "dagster._core.run_coordinator.default_run_coordinator",
                    "class": "DefaultRunCoordinator",
                },
            },
        )
    )
    target: WorkspaceLoadTarget = ModuleTarget(
        TINY, attribute=None, working_directory=str(Path(__file__).resolve().parents[2]), location_name="tiny"
    )
    return stack.enter_context(WorkspaceProcessContext(instance, target))
