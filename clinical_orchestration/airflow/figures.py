"""Figures over all DAG runs and task instances, counted by the database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clinical_orchestration.airflow.database import dag_runs, job_ticks, run_attempts, runs, task_instances, task_tries
from clinical_orchestration.airflow.runs import TASK_STATE
from clinical_orchestration.airflow.states import FAILED, RUN_STATES, RUNNING, SCHEDULED, SKIPPED, UPSTREAM_FAILED

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from clinical_orchestration.airflow.control import Control

TICKS_OF = timedelta(hours=1)

Summed = tuple[int, float]
"""How many, and their seconds together."""


@dataclass(frozen=True)
class Figures:
    """What there is now. Attempts count each by itself: one that failed stays counted when a later one succeeds."""

    runs: Mapping[tuple[str, str], int]
    """(DAG, state) -> DAG runs."""
    attempts: Mapping[tuple[str, str], Summed]
    """(DAG, ``success`` | ``failed``) -> Dagster runs that ended, and how long they took."""
    delays: Mapping[str, Summed]
    """DAG -> scheduled runs, and how long after their ticks they began."""
    tries: Mapping[tuple[str, str, str], Summed]
    """(DAG, task, state) -> attempts at tasks that ended."""
    passed_over: Mapping[tuple[str, str, str], int]
    """(DAG, task, ``skipped`` | ``upstream_failed``) -> task instances that never began."""
    running: Mapping[str, int]
    """Pool -> task instances that run."""
    waiting: Mapping[str, int]
    """Pool -> task instances that could begin."""
    queued: int
    """Dagster runs in the queue."""
    queued_since: datetime | None
    in_progress: int
    """Dagster runs that hold a slot of the queue."""
    ticks: Mapping[tuple[str, str], int]
    """(sensor, status) -> its ticks in the last hour."""


def read_figures(control: Control) -> Figures:
    """Count everything.

    Raises:
        Exception: the database does not answer.
    """
    book = control.runs
    counts = book.counts()
    running, waiting = tasks_by_pool(control, RUNNING), tasks_by_pool(control, SCHEDULED)
    with book.engine.connect() as connection:
        queued, since, in_progress = connection.execute(
            sa.select(
                sa.func.count().filter(runs.c.status == "QUEUED"),
                sa.func.min(runs.c.create_timestamp).filter(runs.c.status == "QUEUED"),
                sa.func.count().filter(runs.c.status != "QUEUED"),
            ).where(runs.c.status.in_(("QUEUED", "STARTING", "STARTED", "CANCELING")))
        ).one()
        return Figures(
            runs=counts,
            attempts=_attempts(connection),
            delays=_delays(connection),
            tries=_tries(connection),
            passed_over=_passed_over(connection),
            running=running,
            waiting=waiting,
            queued=queued,
            queued_since=since.replace(tzinfo=UTC) if since is not None else None,
            in_progress=in_progress,
            ticks=_ticks(connection, control),
        )


def tasks_by_pool(control: Control, state: str) -> dict[str, int]:
    """Return the number of task instances of unfinished runs that are in a state, by pool."""
    control.runs.take_up()
    control.runs.project()
    query = (
        sa.select(task_instances.c.pool, sa.func.count())
        .select_from(task_instances.join(dag_runs, dag_runs.c.id == task_instances.c.dag_run))
        .where(dag_runs.c.projected_final.is_(False), TASK_STATE.in_((state,)))
        .group_by(task_instances.c.pool)
    )
    with control.runs.engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


def _attempts(connection: Connection) -> dict[tuple[str, str], Summed]:
    query = (
        sa.select(
            dag_runs.c.dag_id, runs.c.status, sa.func.count(), sa.func.sum(runs.c.end_time - runs.c.start_time)
        )
        .select_from(
            dag_runs.join(run_attempts, run_attempts.c.dag_run == dag_runs.c.id).join(
                runs, runs.c.run_id == run_attempts.c.dagster_run_id
            )
        )
        .where(runs.c.status.in_(("SUCCESS", "FAILURE", "CANCELED")))
        .group_by(dag_runs.c.dag_id, runs.c.status)
    )  # fmt: skip
    found: dict[tuple[str, str], Summed] = {}
    for dag_id, status, count, seconds in connection.execute(query):
        before = found.get((dag_id, RUN_STATES[status]), (0, 0.0))
        found[dag_id, RUN_STATES[status]] = (before[0] + count, before[1] + float(seconds or 0.0))
    return found


def _delays(connection: Connection) -> dict[str, Summed]:
    late = runs.c.start_time - sa.extract("epoch", dag_runs.c.data_interval_end)
    query = (
        sa.select(dag_runs.c.dag_id, sa.func.count(), sa.func.sum(late))
        .select_from(
            dag_runs.join(
                run_attempts, sa.and_(run_attempts.c.dag_run == dag_runs.c.id, run_attempts.c.number == 1)
            ).join(runs, runs.c.run_id == run_attempts.c.dagster_run_id)
        )
        .where(dag_runs.c.run_type == "scheduled", runs.c.start_time.is_not(None))
        .group_by(dag_runs.c.dag_id)
    )
    return {dag_id: (count, float(seconds)) for dag_id, count, seconds in connection.execute(query)}


def _tries(connection: Connection) -> dict[tuple[str, str, str], Summed]:
    lasted = sa.extract("epoch", task_tries.c.end_date - task_tries.c.start_date)
    query = (
        sa.select(dag_runs.c.dag_id, task_tries.c.task_id, task_tries.c.state, sa.func.count(), sa.func.sum(lasted))
        .select_from(task_tries.join(dag_runs, dag_runs.c.id == task_tries.c.dag_run))
        .where(task_tries.c.end_date.is_not(None))
        .group_by(dag_runs.c.dag_id, task_tries.c.task_id, task_tries.c.state)
    )
    return {
        (dag_id, task_id, state or FAILED): (count, float(seconds or 0.0))
        for dag_id, task_id, state, count, seconds in connection.execute(query)
    }


def _passed_over(connection: Connection) -> dict[tuple[str, str, str], int]:
    query = (
        sa.select(dag_runs.c.dag_id, task_instances.c.task_id, task_instances.c.state, sa.func.count())
        .select_from(task_instances.join(dag_runs, dag_runs.c.id == task_instances.c.dag_run))
        .where(task_instances.c.state.in_((SKIPPED, UPSTREAM_FAILED)))
        .group_by(dag_runs.c.dag_id, task_instances.c.task_id, task_instances.c.state)
    )
    return {(dag_id, task_id, state): count for dag_id, task_id, state, count in connection.execute(query)}


def _ticks(connection: Connection, control: Control) -> dict[tuple[str, str], int]:
    names = {
        state.selector_id: state.instigator_name
        for state in control.instance().all_instigator_state()
        if state.instigator_type.value == "SENSOR"
    }
    since = (datetime.now(UTC) - TICKS_OF).replace(tzinfo=None)
    query = (
        sa.select(job_ticks.c.selector_id, job_ticks.c.status, sa.func.count())
        .where(job_ticks.c.selector_id.in_(list(names)), job_ticks.c.timestamp >= since)
        .group_by(job_ticks.c.selector_id, job_ticks.c.status)
    )
    found: dict[tuple[str, str], int] = {}
    for selector, status, count in connection.execute(query):
        key = names[selector], status.lower()
        found[key] = found.get(key, 0) + count
    return found
