"""One run as its page shows it: tasks in their graph, tries, the log of one try, conf and note."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from clinical_orchestration.airflow.control import UnknownError
from clinical_orchestration.airflow.states import FAILED, FINISHED
from clinical_orchestration.page.graph import Node, lay_out
from clinical_orchestration.page.pipelines import RUNS_SHOWN, Bar, bars_of, dag_links, run_link

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Task
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.airflow.logs import LogReader
    from clinical_orchestration.airflow.runs import DagRun, TaskInstance

LOG_CHARACTERS = 100_000
"""So much of the end of a log is shown; the API gives all of it."""


@dataclass(frozen=True)
class TaskView:
    """One task of the run; `seconds` its duration, so far while it runs. `tries` are (number, address of its log)."""

    task_id: str
    state: str
    started: datetime | None
    seconds: float | None
    tries: tuple[tuple[int, str], ...]
    pool: str
    note: str | None
    description: str
    assets: tuple[tuple[str, str], ...]
    link: str


@dataclass(frozen=True)
class LogView:
    """The log of one try of a task, its end where it is long; `whole` is the address of all of it."""

    task: TaskView
    number: int
    state: str
    text: str
    cut: bool
    whole: str
    dagster: str | None


@dataclass(frozen=True)
class RunView:
    """One run. `tasks` stand in the order in which `nodes` are drawn, `bars` are the newest runs of the pipeline."""

    run: DagRun
    seconds: float | None
    conf: str
    tasks: Mapping[str, TaskView]
    nodes: tuple[Node, ...]
    paths: tuple[str, ...]
    width: float
    height: float
    bars: tuple[Bar, ...]
    links: tuple[tuple[str, str], ...]
    log: LogView | None
    api: str
    """Address of the run in the API."""

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.run.state in FINISHED

    @property
    def failed(self) -> TaskView | None:
        """The first task that failed."""
        return next((task for task in self.tasks.values() if task.state == FAILED), None)

    @property
    def done(self) -> int:
        """Tasks that need no more work."""
        return sum(task.state in ("success", "skipped") for task in self.tasks.values())


def read_run(
    control: Control, logs: LogReader | None, dag_id: str, run_id: str, task_id: str, number: int | None, prefix: str
) -> RunView:
    """Return a run with its tasks, and the log of one of them.

    Args:
        control: Airflow's view of the instance.
        logs: reads logs; None where the reader may not see them.
        dag_id: the pipeline.
        run_id: the run.
        task_id: whose log to read; empty for none.
        number: which try; None for the newest.
        prefix: path under which the Dagster UI is mounted.

    Raises:
        UnknownError: there is no such pipeline, run or task.
        RefusedError: the workspace is not open yet.
    """
    run = control.run(dag_id, run_id)
    dag = control.dag(dag_id)
    now = datetime.now(UTC)
    instances = control.runs.tasks_of(run)
    page = run_link(dag_id, run_id)
    api = f"/api/v1/dags/{quote(dag_id, safe='')}/dagRuns/{quote(run_id, safe='')}"
    graph = lay_out(dag.tasks)
    tasks = {
        node.task_id: _task_view(dag.tasks[node.task_id], instances.get(node.task_id), page, prefix, now)
        for node in graph.nodes
    }
    log = None
    if task_id:
        if task_id not in tasks:
            raise UnknownError(f"The task {task_id} is none of {dag_id}")
        instance = instances.get(task_id)
        if logs is not None and instance is not None:
            log = _log_view(control, logs, instance, tasks[task_id], number, api, prefix)
    attempts = [] if run.held else control.runs.attempts(run)
    runs = [
        ("Dagster run" if len(attempts) == 1 else f"Dagster run {place}", f"{prefix}/runs/{one}")
        for place, one in enumerate(attempts, 1)
    ]
    return RunView(
        run=run,
        seconds=((run.end_date or now) - run.start_date).total_seconds() if run.start_date else None,
        conf=json.dumps(run.conf, indent=2, ensure_ascii=False, sort_keys=True),
        tasks=tasks,
        nodes=graph.nodes,
        paths=graph.paths,
        width=graph.width,
        height=graph.height,
        bars=bars_of(control.runs.latest([dag_id], RUNS_SHOWN).get(dag_id, ()), now),
        links=(*runs, *dag_links(dag, prefix)),
        log=log,
        api=api,
    )


def _task_view(task: Task, instance: TaskInstance | None, page: str, prefix: str, now: datetime) -> TaskView:
    started = instance.start_date if instance else None
    # what never started has a moment, not a duration
    tries = instance.try_number if instance else 0
    seconds = None
    if instance is not None and started is not None and tries:
        seconds = ((instance.end_date or now) - started).total_seconds()

    def link(**more: int) -> str:
        return f"{page}?{urlencode({'task': task.task_id, **more})}#task"

    return TaskView(
        task_id=task.task_id,
        state=(instance.state if instance else None) or "none",
        started=started,
        seconds=seconds,
        tries=tuple((number, link(**{"try": number})) for number in range(1, tries + 1)),
        pool=task.pool,
        note=instance.note if instance else None,
        description=task.description,
        assets=tuple((key, f"{prefix}/assets/{quote(key)}") for key in task.assets),
        link=link(),
    )


def _log_view(
    control: Control,
    logs: LogReader,
    instance: TaskInstance,
    task: TaskView,
    number: int | None,
    api: str,
    prefix: str,
) -> LogView:
    chosen = number or max(1, instance.try_number)
    tries = {one.number: one for one in control.runs.tries(instance.run, task.task_id)}
    one = tries.get(chosen)
    text = logs.read(instance, chosen).text
    return LogView(
        task=task,
        number=chosen,
        state=(one.state if one else None) or task.state,
        text=text[-LOG_CHARACTERS:],
        cut=len(text) > LOG_CHARACTERS,
        whole=f"{api}/taskInstances/{quote(task.task_id, safe='')}/logs/{chosen}?full_content=true",
        dagster=f"{prefix}/runs/{one.dagster_run_id}" if one else None,
    )
