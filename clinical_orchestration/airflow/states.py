"""What Dagster's runs and step events are in Airflow's words. Pure.

States as in Airflow 2.11: a task that waits has no state (None), one whose upstream failed is ``upstream_failed``, one
on a branch not taken is ``skipped``; what had not begun when a run was ended by hand is ``skipped`` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from clinical_orchestration.airflow.catalog import Dag, Task

QUEUED, RUNNING, SUCCESS, FAILED = "queued", "running", "success", "failed"
SKIPPED, UPSTREAM_FAILED, UP_FOR_RETRY, SCHEDULED = "skipped", "upstream_failed", "up_for_retry", "scheduled"

RUN_STATES = {
    "NOT_STARTED": QUEUED,
    "MANAGED": QUEUED,
    "QUEUED": QUEUED,
    "STARTING": QUEUED,
    "STARTED": RUNNING,
    "CANCELING": RUNNING,
    "SUCCESS": SUCCESS,
    "FAILURE": FAILED,
    "CANCELED": FAILED,
}
"""Status of a Dagster run -> state of the DAG run."""

FINISHED = (SUCCESS, FAILED)
_TERMINAL = {SUCCESS, FAILED, SKIPPED, UPSTREAM_FAILED}

STEP_EVENTS = ("STEP_START", "STEP_SUCCESS", "STEP_FAILURE", "STEP_SKIPPED", "STEP_UP_FOR_RETRY", "STEP_RESTARTED")
RUN_EVENTS = (
    "PIPELINE_START", "PIPELINE_SUCCESS", "PIPELINE_FAILURE", "PIPELINE_CANCELED", "PIPELINE_ENQUEUED",
    "PIPELINE_CANCELING", "PIPELINE_STARTING",
)  # fmt: skip


class Event(NamedTuple):
    """One step event of a run, in the order of the event log."""

    kind: str
    step: str
    at: datetime


class Try(NamedTuple):
    """One attempt at a task. `dagster_run` is the run that made it, `number` counts from 1."""

    number: int
    state: str
    start: datetime | None
    end: datetime | None
    dagster_run: str

    @property
    def duration(self) -> float | None:
        """Seconds; None while it runs."""
        return (self.end - self.start).total_seconds() if self.start and self.end else None


@dataclass(frozen=True)
class Attempt:
    """One Dagster run of a DAG run: the first, or one that clearing or re-execution added."""

    dagster_run: str
    status: str
    created: datetime
    start: datetime | None
    end: datetime | None
    events: Sequence[Event]
    steps: frozenset[str] | None = None
    """Steps that it executes; None for all."""


@dataclass(frozen=True)
class TaskState:
    """A task of a DAG run, now."""

    task_id: str
    state: str | None
    start: datetime | None = None
    end: datetime | None = None
    tries: tuple[Try, ...] = ()
    queued: datetime | None = None

    @property
    def duration(self) -> float | None:
        """Seconds of the last attempt; None before it has ended."""
        return (self.end - self.start).total_seconds() if self.start and self.end else None


def task_states(dag: Dag, attempts: Sequence[Attempt], created: datetime) -> dict[str, TaskState]:
    """Return the state of every task of a DAG run.

    Args:
        dag: its tasks.
        attempts: the Dagster runs behind the DAG run, oldest first; empty while it waits for its DAG to be unpaused.
        created: when the DAG run was created.
    """
    states = {task_id: TaskState(task_id, None) for task_id in dag.tasks}
    if not attempts:
        return states
    for attempt in attempts:
        for step, events in _by_step(attempt.events).items():
            task = dag.by_step.get(step)
            if task is not None:
                states[task.task_id] = _advanced(states[task.task_id], events, attempt)
    last = attempts[-1]
    run_state = RUN_STATES.get(last.status, QUEUED)
    if last.steps is not None:  # what is to be executed again has no state before its turn comes
        executed = {event.step for event in last.events}
        for step in last.steps - executed:
            task = dag.by_step.get(step)
            if task is not None and run_state not in FINISHED:
                states[task.task_id] = replace(states[task.task_id], state=None, start=None, end=None)
    _markers(dag, states, last, run_state)
    for task_id in _in_order(dag):
        if states[task_id].state is None:
            states[task_id] = _unstarted(dag, dag.tasks[task_id], states, run_state, last, created)
        elif states[task_id].state in (RUNNING, UP_FOR_RETRY) and run_state in FINISHED:
            # the worker died or was cancelled in the middle of the step
            states[task_id] = _ended(states[task_id], last.end or last.start or created)
    _close(dag, states, last, run_state)
    return states


def _by_step(events: Iterable[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.step, []).append(event)
    return found


def _advanced(before: TaskState, events: Sequence[Event], attempt: Attempt) -> TaskState:
    tries = list(before.tries)
    state: str | None = None
    for event in events:
        match event.kind:
            case "STEP_START" | "STEP_RESTARTED":
                if state == RUNNING:  # restarted without a word about the end of the one before
                    tries[-1] = tries[-1]._replace(state=FAILED, end=event.at)
                tries.append(Try(len(tries) + 1, RUNNING, event.at, None, attempt.dagster_run))
                state = RUNNING
            case "STEP_SKIPPED":
                state = SKIPPED
                return TaskState(before.task_id, SKIPPED, event.at, event.at, tuple(tries), before.queued)
            case "STEP_SUCCESS" | "STEP_FAILURE" | "STEP_UP_FOR_RETRY":
                state = {"STEP_SUCCESS": SUCCESS, "STEP_FAILURE": FAILED}.get(event.kind, UP_FOR_RETRY)
                ended = FAILED if state == UP_FOR_RETRY else state
                if tries and tries[-1].state == RUNNING:
                    tries[-1] = tries[-1]._replace(state=ended, end=event.at)
                else:  # it failed before it could start
                    tries.append(Try(len(tries) + 1, ended, event.at, event.at, attempt.dagster_run))
    last = tries[-1] if tries else None
    return TaskState(
        before.task_id, state, last.start if last else None, last.end if last else None, tuple(tries), attempt.created
    )


def _ended(before: TaskState, at: datetime) -> TaskState:
    tries = before.tries
    if tries and tries[-1].state == RUNNING:
        tries = (*tries[:-1], tries[-1]._replace(state=FAILED, end=at))
    return replace(before, state=FAILED, end=at, tries=tries)


def _markers(dag: Dag, states: dict[str, TaskState], last: Attempt, run_state: str) -> None:
    if last.start is None:
        return
    for task in dag.tasks.values():
        if task.step is None and task.starts:
            first = Try(1, SUCCESS, last.start, last.start, last.dagster_run)
            states[task.task_id] = TaskState(task.task_id, SUCCESS, last.start, last.start, (first,), last.created)


def _close(dag: Dag, states: dict[str, TaskState], last: Attempt, run_state: str) -> None:
    """Set the tasks that stand for the end of the run."""
    if run_state != SUCCESS or last.end is None:
        return
    for task in dag.tasks.values():
        if task.step is None and not task.starts:
            one = Try(1, SUCCESS, last.end, last.end, last.dagster_run)
            states[task.task_id] = TaskState(task.task_id, SUCCESS, last.end, last.end, (one,), last.created)


def _unstarted(
    dag: Dag, task: Task, states: Mapping[str, TaskState], run_state: str, last: Attempt, created: datetime
) -> TaskState:
    above = [states[name].state for name in task.upstream]
    if run_state in FINISHED:
        end = last.end or created
        if run_state == FAILED and last.status != "CANCELED" and any(s in (FAILED, UPSTREAM_FAILED) for s in above):
            return TaskState(task.task_id, UPSTREAM_FAILED, end, end)
        return TaskState(task.task_id, SKIPPED, end, end) if run_state == FAILED else TaskState(task.task_id, None)
    if run_state == RUNNING:
        if any(state in (FAILED, UPSTREAM_FAILED) for state in above):
            return TaskState(task.task_id, UPSTREAM_FAILED)
        if task.step is not None and all(state == SUCCESS for state in above):
            return TaskState(task.task_id, SCHEDULED, queued=last.start)
    return TaskState(task.task_id, None)


def _in_order(dag: Dag) -> list[str]:
    order: list[str] = []
    waiting = dict(dag.tasks)
    while waiting:
        ready = [name for name, task in waiting.items() if not any(before in waiting for before in task.upstream)]
        if not ready:  # a contract with a circle: take what is left as it is written
            ready = list(waiting)
        for name in ready:
            order.append(name)
            del waiting[name]
    return order
