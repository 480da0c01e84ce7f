"""What several commands about DAGs take and ask."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli.command import Arg, CommandError

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control

DAG_ID = Arg("dag_id", help="The id of the dag")
SUBDIR = Arg("-S", "--subdir", help="Taken for compatibility; the code is what the workspace names")
YES = Arg("-y", "--yes", help="Do not prompt to confirm. Use with care!", action="store_true")
REGEX = Arg("--treat-dag-id-as-regex", help="Treat dag_id as a regex pattern", action="store_true")


def find(control: Control, dag_id: str) -> Dag:
    """Return a DAG.

    Raises:
        CommandError: there is none of this id.
    """
    dag = control.catalog().dags.get(dag_id)
    if dag is None:
        raise CommandError(
            f"DAG: {dag_id} does not exist in 'dag' table. There are: {', '.join(sorted(control.catalog().dags))}"
        )
    return dag


def moment(text: str) -> datetime:
    """Read a date or time of the command line; without a zone it is UTC."""
    from clinical_orchestration.api.call import parse_time

    try:
        return parse_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO 8601 date or time") from None


def positive(text: str) -> int:
    """Read a whole number from 1."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return number


def conf(text: str) -> dict[str, Any]:
    """Read the conf of a run, a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def agreed(args: argparse.Namespace, question: str) -> bool:
    """Ask on standard input, unless ``--yes`` was given."""
    if args.yes:
        return True
    sys.stdout.write(f"{question}\n\nAre you sure? [y/n]\n")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


START_DATE = Arg("-s", "--start-date", type=moment, help="Override start_date YYYY-MM-DD")
END_DATE = Arg("-e", "--end-date", type=moment, help="Override end_date YYYY-MM-DD")
CONF = Arg("-c", "--conf", type=conf, help="JSON string that gets pickled into the DagRun's conf attribute")
