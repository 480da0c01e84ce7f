"""Who gives a command: the user that the environment names, else whoever holds the database's credentials."""

from __future__ import annotations

import getpass
import os

from clinical_orchestration.users.identity import Identity
from clinical_orchestration.users.roles import ADMIN, EVERYTHING
from clinical_orchestration.users.store import UserStore

USER_VARIABLE = "CLINICAL_USER"
PASSWORD_VARIABLE = "CLINICAL_PASSWORD"  # noqa: S105 - a name


def named_user() -> tuple[str, str] | None:
    """Return name and password of the user that the environment names; None where it names none."""
    name = os.environ.get(USER_VARIABLE, "")
    return (name, os.environ.get(PASSWORD_VARIABLE, "")) if name else None


def current_identity(store: UserStore) -> Identity:
    """Return who gives this command.

    Without ``CLINICAL_USER`` that is ``os:<user>``, an administrator: the command works on the database directly, and
    who holds its credentials could do everything anyway.

    Args:
        store: asked only where the environment names a user.

    Raises:
        clinical_orchestration.users.store.LoginError: ``CLINICAL_USER`` and ``CLINICAL_PASSWORD`` are not right.
        clinical_orchestration.platform.database.StoreUnavailableError: the database does not answer.
    """
    named = named_user()
    if named is not None:
        return store.authenticate(*named, address="command line").identity
    return Identity(f"os:{_os_user()}", (ADMIN,), EVERYTHING, "system")


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run a number that has no name
        return str(os.getuid())
