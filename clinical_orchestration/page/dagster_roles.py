"""What the roles of Airflow permit in the Dagster UI: a viewer sees everything and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clinical_orchestration.users.roles import CREATE, DELETE, EDIT, MENU, Permission

if TYPE_CHECKING:
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.permissions import PermissionResult
    from starlette.applications import Starlette

    from clinical_orchestration.users.identity import Identity

_LAUNCH, _STOP, _SWITCH = (CREATE, "DAG Runs"), (EDIT, "DAG Runs"), (EDIT, "DAGs")
_ADMINISTRATION = (MENU, "Admin")

NEEDED: Mapping[str, Permission] = {
    "launch_pipeline_execution": _LAUNCH,
    "launch_pipeline_reexecution": _LAUNCH,
    "launch_partition_backfill": _LAUNCH,
    "cancel_partition_backfill": _STOP,
    "terminate_pipeline_execution": _STOP,
    "delete_pipeline_run": (DELETE, "DAG Runs"),
    "start_schedule": _SWITCH,
    "stop_running_schedule": _SWITCH,
    "edit_sensor": _SWITCH,
    "schedule_dry_run": _SWITCH,
    "sensor_dry_run": _SWITCH,
    "edit_concurrency_limit": (EDIT, "Pools"),
}
"""Airflow's permission by Dagster's; what is not here is administration: reloading code, wiping assets, cursors."""


def permissions_for(identity: Identity | None, all_permissions: Mapping[str, bool]) -> dict[str, bool]:
    """Return which of Dagster's permissions somebody has.

    Args:
        identity: who asks; None permits nothing.
        all_permissions: Dagster's permissions, and whether it has what they are about at all.
    """
    return {
        str(name): there and identity is not None and identity.may(*NEEDED.get(str(name), _ADMINISTRATION))
        for name, there in all_permissions.items()
    }


def create_ui(context: WorkspaceProcessContext, prefix: str) -> Starlette:
    """Return the Dagster UI below a prefix, whose requests may do what the roles of ``request.state.identity`` permit.

    A request without an identity may only look.
    """
    from dagster._core.workspace.context import WorkspaceRequestContext
    from dagster._core.workspace.permissions import (
        EDITOR_PERMISSIONS,
        LOCATION_SCOPED_PERMISSIONS,
        PermissionResult,
    )
    from dagster_webserver.webserver import DagsterWebserver

    class RequestOfUser(WorkspaceRequestContext):
        """A request, with what its user may do."""

        def __init__(self, identity: Identity | None, source: Any) -> None:
            found = permissions_for(identity, EDITOR_PERMISSIONS)
            super().__init__(
                instance=context.instance,
                current_workspace=context.get_current_workspace(),
                process_context=context,
                version=context.version,
                source=source,
                read_only=not any(found.values()),
            )
            self._of_user = {
                name: PermissionResult(allowed, None if allowed else "The roles of this user do not permit it")
                for name, allowed in found.items()
            }

        @property
        def permissions(self) -> Mapping[str, PermissionResult]:
            return self._of_user

        def permissions_for_location(self, *, location_name: str) -> Mapping[str, PermissionResult]:
            return {name: self._of_user[name] for name in LOCATION_SCOPED_PERMISSIONS}

    class UiOfUsers(DagsterWebserver):  # type: ignore[misc]
        def _make_request_context(self, conn: Any) -> RequestOfUser:
            return RequestOfUser(conn.scope.get("state", {}).get("identity"), conn)

    app: Starlette = UiOfUsers(context, prefix).create_asgi_app()
    return app
