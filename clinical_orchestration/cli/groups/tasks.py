"""``airflow tasks``: the tasks of a DAG, and how they did in a run."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.groups.dag_words import DAG_ID, END_DATE, START_DATE, SUBDIR, YES, agreed, find, moment
from clinical_orchestration.cli.output import say, show

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.airflow.runs import DagRun

RUN = Arg("execution_date_or_run_id", help="The execution_date of the DAG or run_id of the DAGRun")
TASK_ID = Arg("task_id", help="The id of the task")


def _list(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        dag = find(control, args.dag_id)
    say(tree(dag) if args.tree else "\n".join(sorted(dag.tasks)))


def tree(dag: Dag) -> str:
    """Return the tasks below one another, each under what it waits for."""
    lines: list[str] = []

    def add(task_id: str, depth: int) -> None:
        kind = "EmptyOperator" if dag.tasks[task_id].step is None else "PythonOperator"
        lines.append(f"{'    ' * depth}<Task({kind}): {task_id}>")
        for below in dag.tasks[task_id].downstream:
            add(below, depth + 1)

    for task in dag.tasks.values():
        if not task.upstream:
            add(task.task_id, 0)
    return "\n".join(lines)


def _run(control: Control, dag_id: str, text: str) -> DagRun:
    from clinical_orchestration.airflow.runs import RunFilter

    find(control, dag_id)
    run = control.runs.get_run(dag_id, text)
    if run is not None:
        return run
    try:
        at = moment(text)
    except argparse.ArgumentTypeError:
        at = None
    if at is not None:
        wanted = RunFilter([dag_id], ranges={("execution_date", "gte"): at, ("execution_date", "lte"): at})
        found, _ = control.runs.list_runs(wanted, limit=1)
        if found:
            return found[0]
    raise CommandError(f"DagRun for {dag_id} with run_id or execution_date of {text!r} not found")


def _states(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        run = _run(control, args.dag_id, args.execution_date_or_run_id)
        tasks = control.runs.tasks_of(run)
    show(
        [
            {
                "dag_id": run.dag_id,
                "execution_date": run.logical_date.isoformat(),
                "task_id": task.task_id,
                "state": task.state,
                "start_date": task.start_date.isoformat() if task.start_date else "",
                "end_date": task.end_date.isoformat() if task.end_date else "",
            }
            for task in tasks.values()
        ],
        args.output,
    )


def _state(args: argparse.Namespace) -> None:
    with deployment.control() as control:
        run = _run(control, args.dag_id, args.execution_date_or_run_id)
        task = control.runs.tasks_of(run).get(args.task_id)
    if task is None:
        raise CommandError(f"Task {args.task_id} is not in {args.dag_id}")
    say(str(task.state))


def _clear(args: argparse.Namespace) -> None:
    from clinical_orchestration.airflow.runs import RunFilter

    with deployment.control() as control:
        dag = find(control, args.dag_id)
        ranges = {}
        if args.start_date:
            ranges["execution_date", "gte"] = args.start_date
        if args.end_date:
            ranges["execution_date", "lte"] = args.end_date
        runs, _ = control.runs.list_runs(RunFilter([dag.dag_id], ranges=ranges), limit=1000)
        chosen = _chosen(dag, args)
        wanted = ("failed", "upstream_failed")
        found = {
            run.run_id: [
                name
                for name, task in control.runs.tasks_of(run).items()
                if name in chosen and (not args.only_failed or task.state in wanted)
            ]
            for run in runs
        }
        found = {run_id: tasks for run_id, tasks in found.items() if tasks}
        if not found:
            say("Nothing to clear.")
            return
        lines = [f"{dag.dag_id} {run_id}: {', '.join(tasks)}" for run_id, tasks in found.items()]
        count = sum(len(tasks) for tasks in found.values())
        if args.yes:
            say("\n".join(lines))
        elif not agreed(args, "\n".join([f"You are about to delete these {count} tasks:", *lines])):
            say("Cancelled, nothing was cleared.")
            return
        for run in runs:
            if run.run_id in found:
                control.clear(run, found[run.run_id])


def _chosen(dag: Dag, args: argparse.Namespace) -> set[str]:
    """Return the tasks that ``--task-regex`` finds, with those before and behind them where that was asked for."""
    if args.task_regex is None:
        return set(dag.tasks)
    try:
        pattern = re.compile(args.task_regex)
    except re.error as error:
        raise CommandError(f"{args.task_regex!r} is no regular expression: {error}") from None
    chosen = {name for name in dag.tasks if pattern.search(name)}
    near = [dag.ancestors(name) for name in chosen] if args.upstream else []
    near += [dag.descendants(name) for name in chosen] if args.downstream else []
    return chosen.union(*near)


GROUP = Group(
    "tasks",
    "Manage tasks",
    (
        Command("list", "List the tasks within a DAG", _list,
                (DAG_ID, Arg("-t", "--tree", help="Tree view", action="store_true"), SUBDIR, VERBOSE)),
        Command("states-for-dag-run", "Get the status of all task instances in a dag run", _states,
                (DAG_ID, RUN, OUTPUT, VERBOSE)),
        Command("state", "Get the status of a task instance", _state, (DAG_ID, TASK_ID, RUN, SUBDIR, VERBOSE)),
        Command(
            "clear", "Clear a set of task instance, as if they never ran", _clear,
            (
                DAG_ID,
                Arg("-t", "--task-regex", help="The regex to filter specific task_ids"),
                START_DATE, END_DATE,
                Arg("-u", "--upstream", help="Include upstream tasks", action="store_true"),
                Arg("-d", "--downstream", help="Include downstream tasks", action="store_true"),
                Arg("-f", "--only-failed", help="Only failed jobs", action="store_true"),
                YES, SUBDIR, VERBOSE,
            ),
        ),
    ),
)  # fmt: skip
