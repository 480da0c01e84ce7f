"""``airflow dags backfill`` and ``dags test``: runs that the command starts and follows to their end."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import VERBOSE, Arg, Command, CommandError
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
)
from clinical_orchestration.cli.output import say

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.airflow.runs import DagRun

LOOK_SECONDS = 0.5
_FAILED = ("failed", "upstream_failed")


def _backfill(args: argparse.Namespace) -> None:
    if args.start_date is None and args.end_date is None:
        raise CommandError("Provide a start_date and/or end_date")
    start, end = args.start_date or args.end_date, args.end_date or args.start_date
    with deployment.control() as control:
        if args.treat_dag_id_as_regex:
            try:
                pattern = re.compile(args.dag_id)
            except re.error as error:
                raise CommandError(f"{args.dag_id!r} is no regular expression: {error}") from None
            dags = [dag for name, dag in sorted(control.catalog().dags.items()) if pattern.search(name)]
        else:
            dags = [find(control, args.dag_id)]
        failed = [run_id for dag in dags for run_id in _backfill_one(control, dag, start, end, args)]
    if failed:
        raise CommandError(f"{len(failed)} run(s) of the backfill failed: {', '.join(failed)}")


def _backfill_one(
    control: Control, dag: Dag, start: datetime, end: datetime, args: argparse.Namespace
) -> list[str]:  # fmt: skip
    """Run one interval after the other; return the ids of the runs that failed."""
    intervals = list(_intervals(dag, start, end))
    if not intervals:
        say(f"{dag.dag_id}: No run dates were found for the given dates and dag interval.")
        return []
    if args.run_backwards:
        intervals.reverse()
    if args.dry_run:
        for begin, _ in intervals:
            say(f"Dry run of DAG {dag.dag_id} on {begin.isoformat()}")
            say("\n".join(f"Task {task_id} located in DAG {dag.dag_id}" for task_id in dag.tasks))
        return []
    _refuse_paused(control, dag)
    there = {begin: run for begin, _ in intervals if (run := _run_at(control, dag, begin)) is not None}
    again = {begin for begin, run in there.items() if args.reset_dagruns or run.state != "success"}
    blocked = [run.run_id for begin, run in there.items() if begin in again and run.state not in ("success", "failed")]
    if blocked:
        raise CommandError(f"{', '.join(blocked)}: wait for the end of these runs, or set them to failed")
    if again and not args.reset_dagruns and not args.rerun_failed_tasks:
        raise CommandError(
            f"{', '.join(there[begin].run_id for begin in again)} failed before: give --rerun-failed-tasks or "
            "--reset-dagruns"
        )
    if again and args.reset_dagruns:
        names = "\n".join(there[begin].run_id for begin in sorted(again))
        if not agreed(args, f"You are about to clear these {len(again)} runs of {dag.dag_id}:\n{names}"):
            raise CommandError("Cancelled, nothing was run.")
    failed = []
    for interval in intervals:
        before = there.get(interval[0])
        if before is not None and interval[0] not in again:
            say(f"{before.run_id}: {before.state} before")
            continue
        if before is not None:
            tasks = [name for name, task in control.runs.tasks_of(before).items() if task.state in _FAILED]
            run = control.clear(before, None if args.reset_dagruns else tasks)
        else:
            run = control.trigger(
                dag, logical_date=interval[0], interval=interval, conf=args.conf, run_type="backfill"
            )  # fmt: skip
        if _follow(control, run).state == "failed":
            failed.append(run.run_id)
            if not args.continue_on_failures:
                break
    return failed


def _intervals(dag: Dag, start: datetime, end: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Yield the data intervals that begin between two moments, both included."""
    if dag.cron is None:
        return
    begin = dag.next_tick(start - timedelta(microseconds=1))
    while begin is not None and begin <= end:
        after = dag.next_tick(begin)
        if after is None:
            return
        yield begin, after
        begin = after


def _run_at(control: Control, dag: Dag, at: datetime) -> DagRun | None:
    from clinical_orchestration.airflow.runs import RunFilter

    wanted = RunFilter([dag.dag_id], ranges={("execution_date", "gte"): at, ("execution_date", "lte"): at})
    runs, _ = control.runs.list_runs(wanted, limit=1)
    return runs[0] if runs else None


def _refuse_paused(control: Control, dag: Dag) -> None:
    if control.switches([dag])[dag.dag_id].paused:
        raise CommandError(f"{dag.dag_id} is paused, so that its runs would wait: airflow dags unpause {dag.dag_id}")


def _follow(control: Control, run: DagRun, *, logs: bool = False) -> DagRun:
    """Say what becomes of a run until it ends; return how it then is."""
    from clinical_orchestration.airflow.logs import LogReader

    reader = LogReader(control)
    told: dict[str, tuple[str | None, int]] = {}
    while True:
        now = control.run(run.dag_id, run.run_id)
        for task in control.runs.tasks_of(now).values():
            state = (task.state, task.try_number)
            if task.state in (None, "scheduled", "queued") or told.get(task.task_id) == state:
                continue
            told[task.task_id] = state
            say(f"{now.run_id} {task.task_id}: {task.state}")
            if logs and task.try_number and task.state in ("success", "failed", "up_for_retry"):
                say(reader.read(task, task.try_number).text.rstrip())
        if now.state in ("success", "failed"):
            say(f"{now.run_id}: {now.state}")
            return now
        time.sleep(LOOK_SECONDS)


def _test(args: argparse.Namespace) -> None:
    from clinical_orchestration.cli.groups.dags import dot, draw

    with deployment.control() as control:
        dag = find(control, args.dag_id)
        _refuse_paused(control, dag)
        at = args.execution_date or datetime.now(UTC)
        run = _run_at(control, dag, at)
        run = control.clear(run) if run is not None else control.trigger(dag, logical_date=at, conf=args.conf)
        args.run_id = run.run_id  # the audit trail names it
        ended = _follow(control, run, logs=True)
        states = {name: task.state for name, task in control.runs.tasks_of(ended).items()}
    if args.show_dagrun or args.save_dagrun or args.imgcat_dagrun:
        text = dot(dag, states)
        if args.show_dagrun:
            say(text)
        if args.save_dagrun or args.imgcat_dagrun:
            draw(text, args.save_dagrun, imgcat=args.imgcat_dagrun)
    if ended.state == "failed":
        raise CommandError("DagRun failed")


BACKFILL = Command(
    "backfill", "Run subsections of a DAG for a specified date range", _backfill,
    (
        DAG_ID, START_DATE, END_DATE, CONF, YES, SUBDIR, REGEX, VERBOSE,
        Arg("-n", "--dry-run", help="Say which runs and tasks there would be", action="store_true"),
        Arg("--reset-dagruns", action="store_true",
            help="if set, the backfill will clear existing runs of the range and run them again"),
        Arg("--rerun-failed-tasks", action="store_true",
            help="if set, the backfill will auto-rerun all the failed tasks of the range"),
        Arg("-B", "--run-backwards", help="if set, the most recent day runs first", action="store_true"),
        Arg("--continue-on-failures", help="if set, the backfill goes on behind a failed run", action="store_true"),
    ),
    description="Runs one data interval of a scheduled DAG after the other and waits for each. feature_backfill has "
    "no schedule: it takes its range as conf.",
)  # fmt: skip
TEST = Command(
    "test", "Execute one single DagRun", _test,
    (
        DAG_ID,
        Arg("execution_date", type=moment, nargs="?", help="The execution date of the DAG (optional)"),
        CONF, SUBDIR,
        Arg("--show-dagrun", action="store_true",
            help="After completing the run, shows the diagram for current DAG Run in DOT language"),
        Arg("--save-dagrun", help="After completing the run, saves the diagram for current DAG Run to the file"),
        Arg("--imgcat-dagrun", action="store_true",
            help="After completing the run, prints the diagram using the imgcat tool"),
        VERBOSE,
    ),
    description="Runs the DAG once, on the platform like any other run, with its logs on standard output.",
)  # fmt: skip
