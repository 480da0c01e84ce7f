"""``airflow db``, ``jobs``, ``info`` and ``version``: whether the deployment works, and what it is."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import sys
import time
from typing import TYPE_CHECKING

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import say, show
from clinical_orchestration.instance import DAEMON_HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from dagster import DagsterInstance

_DAEMONS = {"SchedulerJob": "SCHEDULER", "TriggererJob": "SENSOR", "DagProcessorJob": "SCHEDULER"}


def _check(args: argparse.Namespace) -> None:
    from clinical_orchestration.platform.store import StoreUnavailableError

    for attempt in range(args.retry + 1):
        try:
            deployment.store().check()
            say("Connection successful.")
            return
        except StoreUnavailableError as error:
            if attempt == args.retry:
                raise CommandError(str(error)) from None
            time.sleep(args.retry_delay)


def _migrations(args: argparse.Namespace) -> None:
    with deployment.instance() as instance:
        instance.get_runs_count()
    say("No migrations left: the tables are those of this version.")


def beats(instance: DagsterInstance) -> dict[str, bool]:
    """Return for each kind of Airflow's jobs whether the daemon that does its work has given a sign of life lately."""
    latest = {
        status.daemon_type: status.last_heartbeat.timestamp if status.last_heartbeat else 0.0
        for status in (instance.get_daemon_statuses() or {}).values()
    }
    oldest = time.time() - DAEMON_HEARTBEAT_SECONDS
    return {kind: latest.get(daemon, 0.0) > oldest for kind, daemon in _DAEMONS.items()}


def _jobs(args: argparse.Namespace) -> None:
    if args.allow_multiple and args.limit <= 1:
        raise CommandError("To use option --allow-multiple, you must set the limit to a value greater than 1.")
    if args.hostname and args.local:
        raise CommandError("You can't use --hostname and --local at the same time")
    here = socket.gethostname()
    if args.hostname and args.hostname not in (here, socket.getfqdn(), "localhost"):
        raise CommandError("No alive jobs found.")
    with deployment.instance() as instance:
        found = beats(instance)
    kinds = [args.job_type] if args.job_type else ["SchedulerJob", "TriggererJob"]
    alive = [kind for kind in kinds if found.get(kind)][: args.limit or None]
    if not alive:
        raise CommandError("No alive jobs found.")
    if len(alive) > 1 and not args.allow_multiple:
        raise CommandError(f"Found {len(alive)} alive jobs. Expected only one.")
    say("Found one alive job." if len(alive) == 1 else f"Found {len(alive)} alive jobs.")


def _version(args: argparse.Namespace) -> None:
    from clinical_orchestration.api.problems import AIRFLOW_VERSION

    say(AIRFLOW_VERSION)


def _info(args: argparse.Namespace) -> None:
    import importlib.metadata

    from clinical_orchestration import __version__
    from clinical_orchestration.api.problems import AIRFLOW_VERSION

    rows = {
        "version": AIRFLOW_VERSION,
        "answered_by": f"clinical-orchestration {__version__}",
        "dagster": importlib.metadata.version("dagster"),
        "executor": "LocalExecutor",
        "dagster_home": os.environ.get("DAGSTER_HOME", ""),
        "database": "postgresql" if os.environ.get("POSTGRES_URL") else "none",
        "webserver": os.environ.get("AIRFLOW_URL", ""),
        "python_version": sys.version.split()[0],
        "python_location": sys.executable,
        "os": platform.system(),
        "architecture": platform.machine(),
    }
    show([{"property": name, "value": value} for name, value in rows.items()], args.output)


DB = Group(
    "db",
    "Database operations",
    (
        Command(
            "check", "Check if the database can be reached", _check,
            (VERBOSE, Arg("--retry", type=int, default=0, help="Retry database check upon failure"),
             Arg("--retry-delay", type=int, default=1, help="Wait time between retries in seconds")),
        ),
        Command("check-migrations", "Check if migration have finished", _migrations,
                (Arg("-t", "--migration-wait-timeout", type=int, default=60, help="timeout"), VERBOSE)),
    ),
)  # fmt: skip
JOBS = Group(
    "jobs",
    "Manage jobs",
    (
        Command(
            "check", "Checks if job(s) are still alive", _jobs,
            (
                Arg("--job-type", choices=("LocalTaskJob", "SchedulerJob", "TriggererJob", "DagProcessorJob"),
                    metavar="{LocalTaskJob,SchedulerJob,TriggererJob,DagProcessorJob}",
                    help="The type of job(s) that will be checked."),
                Arg("--hostname", help="The hostname of job(s) that will be checked."),
                Arg("--local", action="store_true", help="If passed, this command will only show jobs of this host"),
                Arg("--limit", type=int, default=1, help="The number of recent jobs that will be checked"),
                Arg("--allow-multiple", action="store_true", help="If passed, there can be several alive jobs"),
                VERBOSE,
            ),
        ),
    ),
)  # fmt: skip
INFO = Command(
    "info", "Show information about current Airflow and environment", _info,
    (OUTPUT, VERBOSE, Arg("--anonymize", action="store_true", help="Taken for compatibility; nothing here is private")),
)  # fmt: skip
VERSION = Command("version", "Show the version", _version)
