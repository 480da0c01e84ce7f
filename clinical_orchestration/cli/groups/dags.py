"""``airflow dags``: the pipelines, their switches and runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import say, show, warn

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control

DAG_ID = Arg("dag_id", help="The id of the dag")
SUBDIR = Arg("-S", "--subdir", help="Taken for compatibility; the code is what the workspace names")
YES = Arg("-y", "--yes", help="Do not prompt to confirm. Use with care!", action="store_true")
REGEX = Arg("--treat-dag-id-as-regex", help="Treat dag_id as a regex pattern", action="store_true")
COLUMNS = Arg(
    "--columns", help="List of columns to render. (default: ['dag_id', 'fileloc', 'owner', 'is_paused'])",
    type=lambda text: [part.strip() for part in text.split(",")], default=["dag_id", "fileloc", "owners", "is_paused"],
)  # fmt: skip
MANY = 10_000


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


def _conf(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _shown(control: Control, dag: Dag) -> dict[str, Any]:
    from clinical_orchestration.api.dags import show_dag

    return show_dag(dag, control.switches([dag])[dag.dag_id], control.catalog().loaded_at)


def _list(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        from clinical_orchestration.api.dags import DAG_FIELDS

        unknown = [name for name in args.columns if name not in DAG_FIELDS and name != "owner"]
        if unknown:
            warn(f"Error: Ignoring the following invalid columns: {unknown}.  List of valid columns: {[*DAG_FIELDS]}")
        columns = [{"owner": "owners"}.get(name, name) for name in args.columns if name not in unknown]
        if control.catalog().import_errors:
            warn("Error: Failed to load all files. For details, run `airflow dags list-import-errors`")
        rows = [_shown(control, dag) for _, dag in sorted(control.catalog().dags.items())]
        show([{name: row[name] for name in columns} for row in rows], args.output)


def _details(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        shown = _shown(control, find(control, args.dag_id))
    if args.output in ("table", "plain"):
        show([{"property_name": name, "property_value": value} for name, value in shown.items()], args.output)
    else:
        show([shown], args.output)


def _import_errors(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        errors = control.catalog().import_errors
    show([{"filepath": name, "error": text} for name, text, _ in errors], args.output)
    if errors:
        raise CommandError(f"{len(errors)} code location(s) do not load")


def _report(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        places: dict[str, list[Dag]] = {}
        for dag in control.catalog().dags.values():
            places.setdefault(dag.location, []).append(dag)
    show(
        [
            {
                "file": location,
                "dag_num": len(dags),
                "task_num": sum(len(dag.tasks) for dag in dags),
                "dags": sorted(dag.dag_id for dag in dags),
            }
            for location, dags in sorted(places.items())
        ],
        args.output,
    )


def _list_runs(args: argparse.Namespace) -> None:
    from clinical_orchestration.airflow.runs import RunFilter

    ranges = {}
    if args.start_date:
        ranges["execution_date", "gte"] = args.start_date
    if args.end_date:
        ranges["execution_date", "lte"] = args.end_date
    with deployment.control() as control:
        find(control, args.dag_id)
        wanted = RunFilter([args.dag_id], states=[args.state.lower()] if args.state else (), ranges=ranges)
        runs, _ = control.runs.list_runs(wanted, limit=MANY, order_by=["-execution_date"])
    show(
        [
            {
                "dag_id": run.dag_id,
                "run_id": run.run_id,
                "state": run.state,
                "execution_date": run.logical_date.isoformat(),
                "start_date": run.start_date.isoformat() if run.start_date else "",
                "end_date": run.end_date.isoformat() if run.end_date else "",
            }
            for run in runs
            if not (args.no_backfill and run.run_type == "backfill")
        ],
        args.output,
    )


def _trigger(args: argparse.Namespace) -> None:
    from clinical_orchestration.airflow.control import ConflictError

    logical = args.exec_date
    if logical is not None and args.replace_microseconds:
        logical = logical.replace(microsecond=0)
    with deployment.control() as control:
        dag = find(control, args.dag_id)
        try:
            run = control.trigger(dag, run_id=args.run_id, logical_date=logical, conf=args.conf)
        except ConflictError as error:
            raise CommandError(str(error)) from None
    args.run_id = run.run_id  # the audit trail names it
    show(
        [
            {
                "conf": run.conf,
                "dag_id": run.dag_id,
                "dag_run_id": run.run_id,
                "data_interval_start": run.data_interval_start.isoformat(),
                "data_interval_end": run.data_interval_end.isoformat(),
                "end_date": run.end_date.isoformat() if run.end_date else None,
                "external_trigger": run.external_trigger,
                "last_scheduling_decision": None,
                "logical_date": run.logical_date.isoformat(),
                "run_type": run.run_type,
                "start_date": run.start_date.isoformat() if run.start_date else None,
                "state": run.state,
            }
        ],
        args.output,
    )


def _pause(args: argparse.Namespace) -> None:
    _set_paused(args, True)


def _unpause(args: argparse.Namespace) -> None:
    _set_paused(args, False)


def _set_paused(args: argparse.Namespace, paused: bool) -> None:
    with deployment.control() as control:
        dags = control.catalog().dags
        if args.treat_dag_id_as_regex:
            try:
                matches = re.compile(args.dag_id)
            except re.error as error:
                raise CommandError(f"{args.dag_id!r} is no regular expression: {error}") from None
            chosen = [dag for name, dag in sorted(dags.items()) if matches.search(name)]
        else:
            chosen = [dags[args.dag_id]] if args.dag_id in dags else []
        switches = control.switches(chosen)
        chosen = [dag for dag in chosen if switches[dag.dag_id].paused != paused]
        if not chosen:
            say(f"No {'un' if paused else ''}paused DAGs were found")
            return
        word = "pause" if paused else "unpause"
        names = ",".join(dag.dag_id for dag in chosen)
        if args.treat_dag_id_as_regex and not _agreed(args, f"You are about to {word} {len(chosen)} DAGs:\n{names}"):
            say("Operation cancelled by user")
            return
        for dag in chosen:
            control.set_paused(dag, paused)
        show([{"dag_id": dag.dag_id, "is_paused": paused} for dag in chosen], args.output)


def _delete(args: argparse.Namespace) -> None:
    from clinical_orchestration.airflow.runs import RunFilter

    with deployment.control() as control:
        dag = find(control, args.dag_id)
        question = "This will drop all existing records related to the specified DAG. Proceed?"
        if not _agreed(args, question):
            say("Cancelled")
            return
        count = 0
        while runs := control.runs.list_runs(RunFilter([dag.dag_id]), limit=100)[0]:
            for run in runs:
                control.delete(run)
            count += len(runs)
    say(f"Removed {count} record(s)")


def _agreed(args: argparse.Namespace, question: str) -> bool:
    if args.yes:
        return True
    sys.stdout.write(f"{question}\n\nAre you sure? [y/n]\n")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _next_execution(args: argparse.Namespace) -> None:
    from datetime import UTC

    with deployment.control() as control:
        dag = find(control, args.dag_id)
        if control.switches([dag])[dag.dag_id].paused:
            warn("[INFO] Please be reminded this DAG is PAUSED now.")
    after = datetime.now(UTC)
    for _ in range(args.num_executions):
        tick = dag.next_tick(after)
        if tick is None:
            warn("[WARN] No following schedule can be found. This DAG may have schedule interval '@once' or `None`.")
            say("None")
            continue
        say(dag.interval_before(tick)[0].isoformat())
        after = tick


def _state(args: argparse.Namespace) -> None:
    from clinical_orchestration.airflow.runs import RunFilter

    at = args.execution_date
    with deployment.control() as control:
        find(control, args.dag_id)
        wanted = RunFilter([args.dag_id], ranges={("execution_date", "gte"): at, ("execution_date", "lte"): at})
        runs, _ = control.runs.list_runs(wanted, limit=1)
    run = runs[0] if runs else None
    say(f"{run.state if run else None}" + (f", {json.dumps(run.conf)}" if run and run.conf else ""))


def _show(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        text = dot(find(control, args.dag_id))
    if args.save is None:
        say(text)
        return
    path = Path(args.save)
    if path.suffix != ".dot":
        raise CommandError(f"{path.suffix or 'No suffix'}: only .dot can be saved; `dot -Tpng` makes a picture of it")
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None
    say(f"File {path} saved")


def dot(dag: Dag) -> str:
    """Return the graph of a DAG in the DOT language."""
    lines = [f"digraph {dag.dag_id} {{", f"\tgraph [label={dag.dag_id} labelloc=t rankdir=LR]"]
    for task in dag.tasks.values():
        color = "#e8f7e4" if task.step is None else "#ffefeb"
        lines.append(
            f'\t{task.task_id} [color="#000000" fillcolor="{color}" label={task.task_id} shape=rectangle '
            'style="filled,rounded"]'
        )
    lines += [f"\t{task.task_id} -> {below}" for task in dag.tasks.values() for below in task.downstream]
    return "\n".join([*lines, "}"])


GROUP = Group(
    "dags",
    "Manage DAGs",
    (
        Command("list", "List all the DAGs", _list, (SUBDIR, OUTPUT, VERBOSE, COLUMNS)),
        Command("details", "Get DAG details given a DAG id", _details, (DAG_ID, OUTPUT, VERBOSE)),
        Command("list-import-errors", "List all the DAGs that have import errors", _import_errors,
                (SUBDIR, OUTPUT, VERBOSE)),
        Command("report", "Show DagBag loading report", _report, (SUBDIR, OUTPUT, VERBOSE)),
        Command(
            "list-runs", "List DAG runs given a DAG id", _list_runs,
            (
                Arg("-d", "--dag-id", required=True, help="The id of the dag"),
                Arg("--no-backfill", help="filter all the backfill dagruns given the dag id", action="store_true"),
                Arg("--state", help="Only list the DAG runs corresponding to the state"),
                OUTPUT, VERBOSE,
                Arg("-s", "--start-date", type=moment, help="Override start_date YYYY-MM-DD"),
                Arg("-e", "--end-date", type=moment, help="Override end_date YYYY-MM-DD"),
            ),
        ),
        Command("state", "Get the status of a dag run", _state,
                (DAG_ID, Arg("execution_date", type=moment, help="The execution date of the DAG"), SUBDIR, VERBOSE)),
        Command(
            "next-execution", "Get the next execution datetimes of a DAG", _next_execution,
            (DAG_ID, SUBDIR, Arg("-n", "--num-executions", type=int, default=1,
                                 help="The number of next execution datetimes to show"), VERBOSE),
        ),
        Command("pause", "Pause DAG(s)", _pause, (DAG_ID, SUBDIR, REGEX, YES, OUTPUT, VERBOSE)),
        Command("unpause", "Resume paused DAG(s)", _unpause, (DAG_ID, SUBDIR, REGEX, YES, OUTPUT, VERBOSE)),
        Command(
            "trigger", "Trigger a DAG run", _trigger,
            (
                DAG_ID, SUBDIR,
                Arg("-r", "--run-id", help="Helps to identify this run"),
                Arg("-c", "--conf", type=_conf, help="JSON string that gets pickled into the DagRun's conf attribute"),
                Arg("-e", "--exec-date", type=moment, help="The execution date of the DAG"),
                VERBOSE,
                Arg("--no-replace-microseconds", dest="replace_microseconds", action="store_false", default=True,
                    help="whether microseconds should be zeroed"),
                OUTPUT,
            ),
        ),
        Command("delete", "Delete all DB records related to the specified DAG", _delete, (DAG_ID, YES, VERBOSE)),
        Command("show", "Displays DAG's tasks with their dependencies", _show,
                (DAG_ID, SUBDIR, Arg("-s", "--save", help="Saves the result to the indicated file (.dot)"), VERBOSE)),
    ),
)  # fmt: skip
