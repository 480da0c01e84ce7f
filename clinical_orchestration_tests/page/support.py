"""Helpers of the page's tests."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dagster import DagsterInstance
from dagster._core.test_utils import instance_for_test
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

from clinical_orchestration.page.keeper import Known
from clinical_orchestration.users.identity import Identity
from clinical_orchestration.users.roles import permissions_of

if TYPE_CHECKING:
    from dagster._core.workspace.load_target import WorkspaceLoadTarget
    from starlette.requests import HTTPConnection

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


class EverybodyIs:
    """A doorkeeper who takes everybody for one user with these roles."""

    def __init__(self, *roles: str) -> None:
        self.identity = Identity("somebody", roles, permissions_of(roles), "token")

    async def known(self, connection: HTTPConnection) -> Known:
        return Known(self.identity)

    async def open_session(self, username: str, password: str, connection: HTTPConnection) -> str:
        return "secret"

    async def close_session(self, known: Known, connection: HTTPConnection) -> None:
        return None

    def open(self) -> None:
        return None

    def turned_away(self, connection: HTTPConnection) -> None:
        return None

    def close(self) -> None:
        return None
