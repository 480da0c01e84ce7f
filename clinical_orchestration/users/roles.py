"""Airflow 2.11's roles and what each permits (those of its FAB provider 1.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Permission = tuple[str, str]
"""(action, resource) by Airflow's names."""

READ, CREATE, EDIT, DELETE, MENU = "can_read", "can_create", "can_edit", "can_delete", "menu_access"
ACTIONS = (CREATE, READ, EDIT, DELETE, MENU)

ADMIN, OP, USER, VIEWER, PUBLIC = "Admin", "Op", "User", "Viewer", "Public"


def _each(action: str, *resources: str) -> frozenset[Permission]:
    return frozenset((action, resource) for resource in resources)


_VIEWER = (
    _each(
        READ, "DAGs", "DAG Dependencies", "DAG Code", "DAG Runs", "Datasets", "Cluster Activity", "Pools",
        "ImportError", "DAG Warnings", "Jobs", "My Password", "My Profile", "SLA Misses", "Task Instances",
        "Task Logs", "XComs", "Website",
    )
    | _each(EDIT, "My Password", "My Profile")
    | _each(
        MENU, "Browse", "DAGs", "DAG Dependencies", "DAG Runs", "Datasets", "Cluster Activity", "Documentation", "Docs",
        "Jobs", "SLA Misses", "Task Instances",
    )
)  # fmt: skip
_USER = (
    _VIEWER
    | _each(CREATE, "Task Instances", "DAG Runs", "Datasets")
    | _each(EDIT, "DAGs", "Task Instances", "DAG Runs")
    | _each(DELETE, "DAGs", "Task Instances", "DAG Runs")
)
_OP = (
    _USER
    | _each(READ, "Configurations", "Connections", "Plugins", "Providers", "Variables")
    | _each(MENU, "Admin", "Configurations", "Connections", "Pools", "Plugins", "Variables", "Providers", "XComs")
    | _each(CREATE, "Connections", "Pools", "Variables")
    | _each(EDIT, "Connections", "Pools", "Variables")
    | _each(DELETE, "Connections", "Pools", "Variables", "XComs", "Datasets")
)
# Airflow gives Admin every pair that it knows, those of its own user and role views too
_ADMIN = (
    _OP
    | _each(READ, "Audit Logs", "Task Reschedules", "Triggers", "Passwords", "Permissions", "View Menus")
    | _each(READ, "Permission Views", "User Stats Chart")
    | _each(EDIT, "Passwords")
    | _each(MENU, "Audit Logs", "Task Reschedules", "Triggers", "Security", "List Users", "List Roles", "Permissions")
    | frozenset((action, resource) for action in (CREATE, READ, EDIT, DELETE) for resource in ("Users", "Roles"))
)

BUILT_IN: Mapping[str, frozenset[Permission]] = {
    ADMIN: _ADMIN,
    PUBLIC: frozenset(),
    VIEWER: _VIEWER,
    USER: _USER,
    OP: _OP,
}
"""Roles that always exist, in Airflow's order, and what they permit; they cannot be changed."""

EVERYTHING = _ADMIN
"""All permissions that there are."""

RESOURCES = frozenset(resource for _, resource in EVERYTHING)


def permissions_of(
    roles: Iterable[str], custom: Mapping[str, frozenset[Permission]] | None = None
) -> frozenset[Permission]:
    """Return what several roles permit together; an unknown role permits nothing.

    Args:
        roles: names.
        custom: roles beside the built-in ones.
    """
    known = {**(custom or {}), **BUILT_IN}
    return frozenset().union(*(known.get(role, frozenset()) for role in roles))
