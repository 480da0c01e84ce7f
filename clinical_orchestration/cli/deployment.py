"""The deployment that a command works on: that of the environment, else the embedded stack of this checkout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clinical_orchestration.cli.command import CommandError

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.audit.trail import AuditTrail
    from clinical_orchestration.platform.store import PlatformStore
    from clinical_orchestration.users.identity import Identity


def use_stack() -> None:
    """Take the environment of the embedded stack where the shell names no database and the stack has been set up.

    What the shell sets itself stays.
    """
    if "POSTGRES_URL" in os.environ:
        return
    from clinical_orchestration.stack import paths
    from clinical_orchestration.stack.model import StackError
    from clinical_orchestration.stack.settings import StackSettings, default_home

    home = default_home()
    if not paths.secrets_file(home).exists():
        return
    try:
        environment = StackSettings.load(home).environment()
    except StackError as error:
        raise CommandError(str(error)) from None
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def store() -> PlatformStore:
    """Return the store of variables and connections.

    Raises:
        CommandError: the environment names no database.
    """
    from clinical_orchestration.platform.store import PlatformStore

    return PlatformStore(url())


def trail() -> AuditTrail:
    """Return the audit trail.

    Raises:
        CommandError: the environment names no database.
    """
    from clinical_orchestration.audit.trail import AuditTrail

    return AuditTrail(url())


def identity() -> Identity:
    """Return who gives the command.

    Raises:
        CommandError: the environment names no database, or a user that may not log in.
    """
    from clinical_orchestration.users.cli_identity import PASSWORD_VARIABLE, USER_VARIABLE, current_identity
    from clinical_orchestration.users.store import LoginError, UserStore

    try:
        return current_identity(UserStore(url()))
    except LoginError as error:
        import socket

        from clinical_orchestration.audit.trail import AuditEntry

        trail().record(AuditEntry("login_failed", "?", "cli", address=socket.gethostname()))
        raise CommandError(f"{USER_VARIABLE} and {PASSWORD_VARIABLE}: {error}") from None


def url() -> str:
    """Return the address of the platform's database.

    Raises:
        CommandError: the environment names none.
    """
    found = os.environ.get("POSTGRES_URL", "")
    if not found:
        raise CommandError(
            "There is no database: POSTGRES_URL is not set. Start the stack (./pipeline-manager.sh --start), or in a "
            'shell of its own: eval "$(./pipeline-manager.sh --env)"'
        )
    return found


@contextlib.contextmanager
def instance() -> Iterator[DagsterInstance]:
    """Give the Dagster instance of ``DAGSTER_HOME``.

    Raises:
        CommandError: it is not set, or the instance's database does not answer.
    """
    if not os.environ.get("DAGSTER_HOME"):
        raise CommandError('DAGSTER_HOME is not set. Start the stack, or: eval "$(./pipeline-manager.sh --env)"')
    from dagster import DagsterInstance
    from sqlalchemy.exc import DBAPIError

    try:
        with DagsterInstance.get() as found:
            yield found
    except DBAPIError as error:
        # the text of the error has the address, and may have what is in a URL
        raise CommandError(f"The database of Dagster does not answer ({type(error.orig).__name__})") from None


@contextlib.contextmanager
def control() -> Iterator[Control]:
    """Give Airflow's view of the deployment: its instance, and the code that its workspace names.

    Nothing of it goes through the page. Runs are started by the daemon.

    Raises:
        CommandError: the instance's database does not answer, or no code server does.
    """
    from pathlib import Path

    with instance() as found:
        # Dagster tells on standard error what it loads; a command's own words stand alone
        import logging

        from dagster._core.workspace.context import WorkspaceProcessContext
        from dagster._core.workspace.load_target import WorkspaceFileTarget

        from clinical_orchestration.airflow.control import AirflowError, Control
        from clinical_orchestration.airflow.database import open_engine

        logging.getLogger("dagster").setLevel(logging.ERROR)
        found.optimize_for_webserver(15_000, pool_recycle=3600, max_overflow=5)
        file = Path(os.environ["DAGSTER_HOME"]) / "workspace.yaml"
        if not file.is_file():
            raise CommandError(f"{file} is missing; DAGSTER_HOME must name the folder that holds it")
        engine = open_engine(os.environ.get("POSTGRES_URL", ""), size=1) if os.environ.get("POSTGRES_URL") else None
        if engine is None:
            raise CommandError("There is no database: POSTGRES_URL is not set")
        try:
            with WorkspaceProcessContext(found, WorkspaceFileTarget(paths=[str(file)])) as workspace:
                yield Control(lambda: workspace, engine)
        except AirflowError as error:
            raise CommandError(str(error)) from None
        finally:
            engine.dispose()
