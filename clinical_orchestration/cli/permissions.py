"""Which permissions a command needs, where ``CLINICAL_USER`` names who gives it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import CommandError
from clinical_orchestration.users.roles import CREATE, DELETE, EDIT, MENU, READ, Permission

_DAG = (READ, "DAGs")
_RUNS = ((READ, "DAGs"), (READ, "DAG Runs"))
_TASKS = (*_RUNS, (READ, "Task Instances"))
_WORK = ((EDIT, "DAGs"), (CREATE, "DAG Runs"))
_ADMINISTRATION = (MENU, "Admin")

NEEDED: Mapping[tuple[str, str | None], tuple[Permission, ...]] = {
    ("dags", "list"): (_DAG,),
    ("dags", "details"): (_DAG,),
    ("dags", "list-import-errors"): ((READ, "ImportError"),),
    ("dags", "report"): (_DAG,),
    ("dags", "list-runs"): _RUNS,
    ("dags", "list-jobs"): ((READ, "DAGs"), (READ, "DAG Runs"), (READ, "Jobs")),
    ("dags", "state"): _RUNS,
    ("dags", "next-execution"): (_DAG,),
    ("dags", "show"): (_DAG,),
    ("dags", "pause"): ((EDIT, "DAGs"),),
    ("dags", "unpause"): ((EDIT, "DAGs"),),
    ("dags", "trigger"): _WORK,
    ("dags", "backfill"): (*_WORK, (EDIT, "Task Instances")),
    ("dags", "test"): (*_WORK, (EDIT, "Task Instances")),
    ("dags", "delete"): ((DELETE, "DAGs"),),
    ("tasks", "list"): ((READ, "DAGs"), (READ, "Task Instances")),
    ("tasks", "states-for-dag-run"): _TASKS,
    ("tasks", "state"): _TASKS,
    ("tasks", "clear"): ((EDIT, "DAGs"), (READ, "DAG Runs"), (EDIT, "Task Instances")),
    ("connections", "list"): ((READ, "Connections"),),
    ("connections", "get"): ((READ, "Connections"),),
    ("connections", "explain"): ((READ, "Connections"),),
    ("connections", "export"): ((READ, "Connections"),),
    ("connections", "test"): ((READ, "Connections"),),
    ("connections", "add"): ((CREATE, "Connections"),),
    ("connections", "import"): ((CREATE, "Connections"), (EDIT, "Connections")),
    ("connections", "create-default-connections"): ((CREATE, "Connections"),),
    ("connections", "delete"): ((DELETE, "Connections"),),
    ("variables", "list"): ((READ, "Variables"),),
    ("variables", "get"): ((READ, "Variables"),),
    ("variables", "explain"): ((READ, "Variables"),),
    ("variables", "export"): ((READ, "Variables"),),
    ("variables", "set"): ((CREATE, "Variables"), (EDIT, "Variables")),
    ("variables", "import"): ((CREATE, "Variables"), (EDIT, "Variables")),
    ("variables", "delete"): ((DELETE, "Variables"),),
    ("pools", "list"): ((READ, "Pools"),),
    ("pools", "get"): ((READ, "Pools"),),
    ("pools", "export"): ((READ, "Pools"),),
    ("pools", "set"): ((CREATE, "Pools"), (EDIT, "Pools")),
    ("pools", "import"): ((CREATE, "Pools"), (EDIT, "Pools")),
    ("pools", "delete"): ((DELETE, "Pools"),),
    ("users", "list"): ((READ, "Users"),),
    ("users", "create"): ((CREATE, "Users"),),
    ("users", "delete"): ((DELETE, "Users"),),
    ("users", "reset-password"): ((EDIT, "Users"),),
    ("users", "password"): ((EDIT, "Users"),),
    ("users", "add-role"): ((EDIT, "Users"),),
    ("users", "remove-role"): ((EDIT, "Users"),),
    ("users", "roles"): ((EDIT, "Users"),),
    ("users", "token"): ((EDIT, "Users"),),
    ("users", "import"): ((CREATE, "Users"), (EDIT, "Users")),
    ("users", "export"): ((READ, "Users"),),
    ("roles", "list"): ((READ, "Roles"),),
    ("roles", "add-perms"): ((EDIT, "Roles"),),
    ("roles", "del-perms"): ((EDIT, "Roles"),),
    ("roles", "import"): ((CREATE, "Roles"),),
    ("roles", "export"): ((READ, "Roles"),),
    ("roles", "create"): ((CREATE, "Roles"),),
    ("roles", "delete"): ((DELETE, "Roles"),),
    ("db", "check"): (),
    ("db", "check-migrations"): (),
    ("jobs", "check"): (),
    ("info", None): (),
    ("version", None): (),
    ("rotate-fernet-key", None): (_ADMINISTRATION,),
    # ours
    ("cohort", "build"): _WORK,
    ("cohort", "show"): (_DAG,),
    ("cohort", "list"): (_DAG,),
    ("cohort", "criteria"): (),
    ("kafka", "topics"): (_DAG,),
    ("kafka", "lag"): (_DAG,),
    ("kafka", "validate"): (),
    ("features", "get"): (_DAG,),
    ("features", "offline"): (_DAG,),
    ("features", "compare"): (_DAG,),
    ("spark", "submit"): _WORK,
    ("spark", "status"): (_DAG,),
    ("spark", "logs"): ((READ, "Task Logs"),),
    ("spark", "kill"): _WORK,
    ("spark", "stream"): _WORK,
    ("data", "tables"): (_DAG,),
    ("data", "quality"): (_DAG,),
    ("models", "list"): (_DAG,),
    ("models", "predict"): (_DAG,),
    ("models", "register"): _WORK,
    ("models", "promote"): _WORK,
    ("models", "experiment"): _WORK,
    ("audit", "verify"): ((READ, "Audit Logs"),),
    ("audit", "list"): ((READ, "Audit Logs"),),
    ("audit", "export"): ((READ, "Audit Logs"),),
}
"""Permissions by the words of a command; what is not here is administration."""


def permitted(words: tuple[str, str | None], args: argparse.Namespace) -> Callable[[], str]:
    """Refuse a command that the user of ``CLINICAL_USER`` may not give; return what tells the user's name.

    Args:
        words: of the command.
        args: the parsed command line.

    Raises:
        CommandError: the user may not do this, or may not log in.
        clinical_orchestration.platform.database.StoreUnavailableError: a user is named, and the database does not
            answer.
    """
    from clinical_orchestration.users.cli_identity import named_user

    needed = NEEDED.get(words, (_ADMINISTRATION,))
    if named_user() is None or not needed:
        return lambda: deployment.identity().name
    identity = deployment.identity()
    if words[1] in ("password", "reset-password") and args.username == identity.name:
        needed = ((EDIT, "My Password"),)
    missing = [f"{action} on {resource}" for action, resource in needed if not identity.may(action, resource)]
    if missing:
        from clinical_orchestration.cli.recording import record_refused

        record_refused(words, args, identity.name)
        raise CommandError(
            f"{identity.name} may not do this: the roles {', '.join(identity.roles) or '(none)'} lack "
            f"{', '.join(missing)}. Ask an administrator for a role that has it."
        )
    return lambda: identity.name
