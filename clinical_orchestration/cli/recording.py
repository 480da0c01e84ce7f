"""Commands that change something, into the audit trail."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import CommandError

if TYPE_CHECKING:
    from clinical_orchestration.audit.recording import Ending
    from clinical_orchestration.audit.trail import AuditEntry

ORIGIN = "cli"

EVENTS: Mapping[tuple[str, str | None], str] = {
    # Airflow's names: of the function behind each command
    ("connections", "add"): "cli_connections_add",
    ("connections", "create-default-connections"): "cli_create_default_connections",
    ("connections", "delete"): "cli_connections_delete",
    ("connections", "import"): "cli_connections_import",
    ("dags", "backfill"): "cli_dag_backfill",
    ("dags", "delete"): "cli_dag_delete",
    ("dags", "pause"): "cli_dag_pause",
    ("dags", "test"): "cli_dag_test",
    ("dags", "trigger"): "cli_dag_trigger",
    ("dags", "unpause"): "cli_dag_unpause",
    ("pools", "delete"): "cli_pool_delete",
    ("pools", "import"): "cli_pool_import",
    ("pools", "set"): "cli_pool_set",
    ("rotate-fernet-key", None): "cli_rotate_fernet_key",
    ("roles", "add-perms"): "cli_roles_add_perms",
    ("roles", "create"): "cli_roles_create",
    ("roles", "del-perms"): "cli_roles_del_perms",
    ("roles", "delete"): "cli_roles_delete",
    ("roles", "import"): "cli_roles_import",
    ("tasks", "clear"): "cli_task_clear",
    ("users", "add-role"): "cli_users_manage_role",
    ("users", "create"): "cli_users_create",
    ("users", "delete"): "cli_users_delete",
    ("users", "import"): "cli_users_import",
    ("users", "remove-role"): "cli_users_manage_role",
    ("users", "reset-password"): "cli_user_reset_password",
    ("variables", "delete"): "cli_variables_delete",
    ("variables", "import"): "cli_variables_import",
    ("variables", "set"): "cli_variables_set",
    # ours
    ("cohort", "build"): "cli_cohort_build",
    ("models", "experiment"): "cli_models_experiment",
    ("models", "promote"): "cli_models_promote",
    ("models", "register"): "cli_models_register",
    ("spark", "kill"): "cli_spark_kill",
    ("spark", "stream"): "cli_spark_stream",
    ("spark", "submit"): "cli_spark_submit",
    ("users", "password"): "cli_user_reset_password",
    ("users", "roles"): "cli_users_manage_role",
    ("users", "token"): "cli_users_token",
}
"""Event by the words of a command."""

_OF_THE_SHELL = frozenset(
    {"group", "command", "handler", "output", "verbose", "color", "yes", "subdir", "rest", "json", "dag_id", "task_id"}
)
_OPAQUE = frozenset({"conn_uri", "conn_json", "conn_extra"})


@contextlib.contextmanager
def recorded(words: tuple[str, str | None], args: argparse.Namespace, who: Callable[[], str]) -> Iterator[Ending]:
    """Record a command around the block that carries it out, if it is one that changes something; give its ending.

    Args:
        words: of the command, such as ``("variables", "set")``.
        args: the parsed command line.
        who: returns the name of the user; asked where there is something to record.

    Raises:
        clinical_orchestration.audit.trail.AuditError: it cannot be recorded; the block is not entered.
    """
    event = EVENTS.get(words)
    from clinical_orchestration.audit.recording import Ending, change

    if event is None or not os.environ.get("POSTGRES_URL"):  # without a database most commands fail, and say why
        yield Ending()
        return
    from clinical_orchestration.platform.database import StoreUnavailableError

    entry = _entry(event, args, who())
    state = _STATES.get(words[0], dict)
    before = state()
    with change(deployment.trail(), entry) as ending:
        yield ending
        ending.run_id = getattr(args, "run_id", None)  # by now that of the run that was triggered
        with contextlib.suppress(StoreUnavailableError, CommandError):  # what was done is done
            after = state()
            names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            ending.old = {name: before[name][0] for name in names if name in before} or None
            ending.new = {name: after[name][0] for name in names if name in after} or None


def record_refused(words: tuple[str, str | None], args: argparse.Namespace, who: str) -> None:
    """Record that somebody may not give a command, if it is one that changes something."""
    from clinical_orchestration.audit.recording import refused

    event = EVENTS.get(words)
    if event is not None:
        refused(deployment.trail(), _entry(event, args, who))


def _entry(event: str, args: argparse.Namespace, who: str) -> AuditEntry:
    import socket

    from clinical_orchestration.audit.trail import AuditEntry

    return AuditEntry(
        event,
        who,
        ORIGIN,
        dag_id=getattr(args, "dag_id", None),
        task_id=getattr(args, "task_id", None),
        run_id=getattr(args, "run_id", None),
        new=_given(args),
        address=socket.gethostname(),
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    from clinical_orchestration.audit.recording import variable_value
    from clinical_orchestration.platform.masking import MASK

    given = {
        name: MASK if name in _OPAQUE else value
        for name, value in vars(args).items()
        if name not in _OF_THE_SHELL and value not in (None, False, [], ())
    }
    return variable_value(given)


# what each of these returns: by name a value as it may be shown, and what else tells that it was changed


def _connections() -> dict[str, tuple[Any, ...]]:
    from clinical_orchestration.audit.recording import connection_value

    found = {}
    for conn_id, one in deployment.store().connections().items():
        secrets = {"password": one.raw_password, "extra": one.raw_extra}
        names = ("conn_type", "description", "host", "schema", "login", "port")
        shown = connection_value({**{name: getattr(one.public, name) for name in names}, **secrets})
        found[conn_id] = (shown, *secrets.values())
    return found


def _variables() -> dict[str, tuple[Any, ...]]:
    from clinical_orchestration.platform.masking import MASK

    return {
        key: (MASK if one.is_encrypted else one.raw, one.raw, one.description)
        for key, one in deployment.store().variables().items()
    }


def _pools() -> dict[str, tuple[Any, ...]]:
    from clinical_orchestration.instance import pool_slots

    known = deployment.store().pools()
    with deployment.instance() as instance:
        slots = pool_slots(instance)
    return {
        name: ({"slots": count, "description": known[name].description if name in known else None},)
        for name, count in slots.items()
    }


def _users() -> dict[str, tuple[Any, ...]]:
    from clinical_orchestration.users.store import UserStore

    return {
        user.username: ({"roles": list(user.roles), "email": user.email}, user.changed_on)
        for user in UserStore(deployment.url()).users()
    }


def _roles() -> dict[str, tuple[Any, ...]]:
    from clinical_orchestration.users.store import UserStore

    return {
        role.name: (sorted(f"{action} on {resource}" for action, resource in role.permissions),)
        for role in UserStore(deployment.url()).roles()
    }


_STATES: Mapping[str, Callable[[], dict[str, tuple[Any, ...]]]] = {
    "connections": _connections,
    "variables": _variables,
    "pools": _pools,
    "users": _users,
    "roles": _roles,
}
