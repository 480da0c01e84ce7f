"""``airflow dags``: the pipelines, their switches and runs."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.groups.dag_words import (
    CONF,
    DAG_ID,
    END_DATE,
    REGEX,
    START_DATE,
    SUBDIR,
    YES,
    agreed,
    find,
    moment,
    positive,
)
from clinical_orchestration.cli.groups.dag_work import BACKFILL, TEST
from clinical_orchestration.cli.output import say, show, warn

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control

COLUMNS = Arg(
    "--columns", help="List of columns to render. (default: ['dag_id', 'fileloc', 'owner', 'is_paused'])",
    type=lambda text: [part.strip() for part in text.split(",")], default=["dag_id", "fileloc", "owners", "is_paused"],
)  # fmt: skip
MANY = 10_000


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


def _list_jobs(args: argparse.Namespace) -> None:
    """List what does the work: scheduler and triggerer, and the worker of each run."""
    from clinical_orchestration.airflow.runs import RunFilter
    from clinical_orchestration.cli.groups.system import beats

    rows = []
    with deployment.control() as control:
        if args.dag_id:
            find(control, args.dag_id)
        else:
            rows = [
                {"dag_id": None, "state": "running" if alive else "failed", "job_type": kind, "start_date": None,
                 "end_date": None}
                for kind, alive in beats(control.instance()).items()
            ]  # fmt: skip
        wanted = RunFilter([args.dag_id] if args.dag_id else None)
        runs, _ = control.runs.list_runs(wanted, limit=MANY, order_by=["-start_date"])
    rows += [
        {
            "dag_id": run.dag_id,
            "state": run.state,
            "job_type": "LocalTaskJob",
            "start_date": run.start_date.isoformat(),
            "end_date": run.end_date.isoformat() if run.end_date else None,
        }
        for run in runs
        if run.start_date is not None
    ]
    chosen = [row for row in rows if not args.state or row["state"] == args.state]
    show(chosen[: args.limit or None], args.output)


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
        if args.treat_dag_id_as_regex and not agreed(args, f"You are about to {word} {len(chosen)} DAGs:\n{names}"):
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
        if not agreed(args, question):
            say("Cancelled")
            return
        count = 0
        while runs := control.runs.list_runs(RunFilter([dag.dag_id]), limit=100)[0]:
            for run in runs:
                control.delete(run)
            count += len(runs)
    say(f"Removed {count} record(s)")


def _next_execution(args: argparse.Namespace) -> None:
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
        dag = find(control, args.dag_id)
    draw(dot(dag), args.save, imgcat=args.imgcat)


def draw(text: str, file: str | None, *, imgcat: bool = False) -> None:
    """Write a graph in the DOT language: to standard output, to a file of any format of graphviz, or as a picture.

    Raises:
        CommandError: the file cannot be written, or the programs that make pictures are missing.
    """
    if file and imgcat:
        raise CommandError(
            "Option --save and --imgcat are mutually exclusive. Please remove one option to execute the command."
        )
    if imgcat:
        picture = _rendered(text, "png")
        if shutil.which("imgcat") is None:
            raise CommandError("Failed to execute. Make sure the imgcat executables are on your systems 'PATH'")
        sys.stdout.flush()
        subprocess.run(["imgcat"], input=picture, check=False)
    elif file:
        kind = Path(file).suffix.removeprefix(".")
        if not kind:
            raise CommandError(f"{file} has no suffix, which says the format: .dot, .png, .svg, .pdf ...")
        content = f"{text}\n".encode() if kind in ("dot", "gv") else _rendered(text, kind)
        try:
            Path(file).write_bytes(content)
        except OSError as error:
            raise CommandError(f"{file} cannot be written: {error.strerror}") from None
        say(f"File {file} saved")
    else:
        say(text)


def _rendered(text: str, kind: str) -> bytes:
    if shutil.which("dot") is None:
        raise CommandError(
            "Pictures need graphviz, whose program `dot` is not on the PATH (Debian: apt-get install graphviz); "
            "--save FILE.dot works without"
        )
    done = subprocess.run(["dot", f"-T{kind}"], input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise CommandError(f"graphviz: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


_COLORS = {
    "success": "green", "failed": "red", "skipped": "hotpink", "upstream_failed": "orange", "running": "lime",
    "queued": "gray", "scheduled": "tan", "up_for_retry": "gold",
}  # fmt: skip


def dot(dag: Dag, states: Mapping[str, str | None] | None = None) -> str:
    """Return the graph of a DAG in the DOT language, with Airflow's colours of the states of a run where given."""
    lines = [f"digraph {dag.dag_id} {{", f"\tgraph [label={dag.dag_id} labelloc=t rankdir=LR]"]
    for task in dag.tasks.values():
        color = "#e8f7e4" if task.step is None else "#ffefeb"
        if states is not None:
            color = _COLORS.get(states.get(task.task_id) or "", "white")
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
                START_DATE, END_DATE,
            ),
        ),
        Command("state", "Get the status of a dag run", _state,
                (DAG_ID, Arg("execution_date", type=moment, help="The execution date of the DAG"), SUBDIR, VERBOSE)),
        Command(
            "next-execution", "Get the next execution datetimes of a DAG", _next_execution,
            (DAG_ID, SUBDIR, Arg("-n", "--num-executions", type=positive, default=1,
                                 help="The number of next execution datetimes to show"), VERBOSE),
        ),
        Command("pause", "Pause DAG(s)", _pause, (DAG_ID, SUBDIR, REGEX, YES, OUTPUT, VERBOSE)),
        Command("unpause", "Resume paused DAG(s)", _unpause, (DAG_ID, SUBDIR, REGEX, YES, OUTPUT, VERBOSE)),
        Command(
            "trigger", "Trigger a DAG run", _trigger,
            (
                DAG_ID, SUBDIR,
                Arg("-r", "--run-id", help="Helps to identify this run"),
                CONF,
                Arg("-e", "--exec-date", type=moment, help="The execution date of the DAG"),
                VERBOSE,
                Arg("--no-replace-microseconds", dest="replace_microseconds", action="store_false", default=True,
                    help="whether microseconds should be zeroed"),
                OUTPUT,
            ),
        ),
        Command("delete", "Delete all DB records related to the specified DAG", _delete, (DAG_ID, YES, VERBOSE)),
        Command("show", "Displays DAG's tasks with their dependencies", _show,
                (DAG_ID, SUBDIR, Arg("-s", "--save", help="Saves the result to the indicated file; its suffix says the "
                     "format. Others than .dot need graphviz"),
                 Arg("--imgcat", help="Displays graph using the imgcat tool.", action="store_true"), VERBOSE)),
        Command("list-jobs", "List the jobs", _list_jobs,
                (Arg("-d", "--dag-id", help="The id of the dag"),
                 Arg("--state", help="Only list the jobs corresponding to the state",
                     choices=("running", "success", "restarting", "failed")),
                 Arg("--limit", type=positive, help="Return a limited number of records"), OUTPUT, VERBOSE)),
        BACKFILL,
        TEST,
    ),
)  # fmt: skip
