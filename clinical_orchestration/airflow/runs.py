"""DAG runs and task instances, read from the database without deserialising Dagster's runs.

:class:`RunBook` first takes up what Dagster has and the tables of :mod:`.database` do not: runs that were started in
the Dagster UI, by a schedule, a sensor or a backfill appear as DAG runs without anybody's doing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert

from clinical_orchestration.airflow.catalog import Catalog, Dag
from clinical_orchestration.airflow.database import (
    create_tables,
    dag_runs,
    event_logs,
    has_dagster,
    run_attempts,
    run_tags,
    runs,
    task_instances,
    task_tries,
    twin_for_reads,
)
from clinical_orchestration.airflow.states import (
    RUN_STATES,
    STEP_EVENTS,
    Attempt,
    Event,
    task_states,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, RowMapping

SCHEDULE_TAG = "dagster/schedule_name"
SENSOR_TAG = "dagster/sensor_name"
BACKFILL_TAG = "dagster/backfill"
TICK_TAG = ".dagster/scheduled_execution_time"
PARENT_TAG = "dagster/parent_run_id"
ROOT_TAG = "dagster/root_run_id"
RUN_ID_TAG = "airflow/run_id"
CONF_TAG = "airflow/conf"
_TAGS = (SCHEDULE_TAG, SENSOR_TAG, BACKFILL_TAG, TICK_TAG, PARENT_TAG, ROOT_TAG, RUN_ID_TAG, CONF_TAG)

_CHUNK = 500
_LOOK_BACK = 1000  # ids of runs are handed out before they are committed: newest ones are looked at again

RUN_STATE = sa.func.coalesce(
    dag_runs.c.state_set,
    sa.case(*((runs.c.status == status, state) for status, state in RUN_STATES.items()), else_="queued"),
)
"""SQL expression of the state of a DAG run, over ``airflow_dag_runs`` joined with ``runs``."""

START_DATE = sa.func.to_timestamp(runs.c.start_time)
END_DATE = sa.func.to_timestamp(runs.c.end_time)
UPDATED_AT = sa.func.coalesce(sa.func.timezone("UTC", runs.c.update_timestamp), dag_runs.c.created_at)
TASK_STATE = sa.func.coalesce(task_instances.c.state_set, task_instances.c.state)


@dataclass(frozen=True)
class DagRun:
    """One DAG run; times in UTC."""

    id: int
    dag_id: str
    run_id: str
    dagster_run_id: str
    logical_date: datetime
    data_interval_start: datetime
    data_interval_end: datetime
    run_type: str
    external_trigger: bool
    state: str
    start_date: datetime | None
    end_date: datetime | None
    updated_at: datetime
    created_at: datetime
    conf: dict[str, Any]
    note: str | None
    held: bool


@dataclass(frozen=True)
class TaskInstance:
    """One task instance; times in UTC, `duration` in seconds, `try_number` 0 before the first attempt."""

    run: DagRun
    task_id: str
    state: str | None
    start_date: datetime | None
    end_date: datetime | None
    duration: float | None
    try_number: int
    max_tries: int
    pool: str
    queued_when: datetime | None
    note: str | None


@dataclass(frozen=True)
class TaskTry:
    """One attempt at a task, and the Dagster run that made it."""

    task_id: str
    number: int
    state: str | None
    start_date: datetime | None
    end_date: datetime | None
    dagster_run_id: str

    @property
    def duration(self) -> float | None:
        """Seconds; None while it runs."""
        return (self.end_date - self.start_date).total_seconds() if self.start_date and self.end_date else None


@dataclass(frozen=True)
class RunFilter:
    """Which DAG runs are wanted; empty collections and None do not filter. Times are inclusive bounds."""

    dag_ids: Sequence[str] | None = None
    run_ids: Sequence[str] | None = None
    states: Sequence[str] = ()
    ranges: Mapping[tuple[str, str], datetime] = field(default_factory=dict)
    """(``execution_date`` | ``start_date`` | ``end_date`` | ``updated_at``, ``gte`` | ``lte``) -> bound."""


@dataclass(frozen=True)
class TaskFilter:
    """Which task instances are wanted, beside the runs of `runs`; empty collections and None do not filter."""

    runs: RunFilter = field(default_factory=RunFilter)
    task_ids: Sequence[str] | None = None
    states: Sequence[str | None] = ()
    pools: Sequence[str] = ()
    ranges: Mapping[tuple[str, str], datetime | float] = field(default_factory=dict)
    """(``start_date`` | ``end_date`` | ``updated_at`` | ``duration``, ``gte`` | ``lte``) -> bound."""


RUN_ORDER: dict[str, Any] = {
    "id": dag_runs.c.id,
    "dag_id": dag_runs.c.dag_id,
    "run_id": dag_runs.c.run_id,
    "dag_run_id": dag_runs.c.run_id,
    "execution_date": dag_runs.c.logical_date,
    "logical_date": dag_runs.c.logical_date,
    "data_interval_start": dag_runs.c.data_interval_start,
    "data_interval_end": dag_runs.c.data_interval_end,
    "start_date": START_DATE,
    "end_date": END_DATE,
    "updated_at": UPDATED_AT,
    "state": RUN_STATE,
    "run_type": dag_runs.c.run_type,
    "external_trigger": dag_runs.c.external_trigger,
    "conf": sa.cast(dag_runs.c.conf, sa.Text),
}
"""What DAG runs can be ordered by."""

_OWN_ORDER = {
    name for name, column in RUN_ORDER.items() if isinstance(column, sa.Column) and column.table is dag_runs
}  # fmt: skip

_RUN_COLUMNS = (
    dag_runs.c.id, dag_runs.c.dag_id, dag_runs.c.run_id, dag_runs.c.dagster_run_id, dag_runs.c.logical_date,
    dag_runs.c.data_interval_start, dag_runs.c.data_interval_end, dag_runs.c.run_type, dag_runs.c.external_trigger,
    RUN_STATE.label("state"), START_DATE.label("start_date"), END_DATE.label("end_date"),
    UPDATED_AT.label("updated_at"), dag_runs.c.created_at, dag_runs.c.conf, dag_runs.c.note, dag_runs.c.held,
)  # fmt: skip
_RUNS = dag_runs.outerjoin(runs, runs.c.run_id == dag_runs.c.dagster_run_id)


class RunBook:
    """DAG runs and task instances of a Dagster instance.

    Args:
        engine: database of the instance.
        catalog: returns the DAGs as they are loaded now.
    """

    def __init__(self, engine: Engine, catalog: Callable[[], Catalog]) -> None:
        self.engine = engine
        self.reads = twin_for_reads(engine)
        self._catalog = catalog
        self._ready = False
        self._newest = 0
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Create what tables are absent; called by every method, cheap after the first time."""
        if not self._ready:
            with self._lock:
                if not self._ready:
                    create_tables(self.engine)
                    self._ready = True

    # --- runs -------------------------------------------------------------------------------------------------------

    def list_runs(
        self, wanted: RunFilter, *, limit: int = 100, offset: int = 0, order_by: Sequence[str] = ("id",)
    ) -> tuple[list[DagRun], int]:
        """Return a page of DAG runs and how many there are in all.

        Args:
            wanted: filter.
            limit: rows at most.
            offset: rows to pass over.
            order_by: names of :data:`RUN_ORDER`, ``-`` in front for descending.

        Raises:
            KeyError: `order_by` names something else.
        """
        self.take_up()
        condition = _run_condition(wanted)
        order = [_ordered(RUN_ORDER, name) for name in order_by]
        asks_dagster = bool(wanted.states) or not {
            *(name.removeprefix("-") for name in order_by), *(name for name, _ in wanted.ranges)
        } <= _OWN_ORDER  # fmt: skip
        # the rows of the page first, and Dagster's of these alone: an index gives the order where it is one of ours
        chosen = (
            sa.select(dag_runs.c.id, (sa.func.count().over() if asks_dagster else sa.null()).label("total"))
            .select_from(_RUNS if asks_dagster else dag_runs)
            .where(condition)
            .order_by(*order, dag_runs.c.id)
            .limit(limit)
            .offset(offset)
            .subquery()
        )
        page = (
            sa.select(*_RUN_COLUMNS, chosen.c.total)
            .select_from(
                chosen.join(dag_runs, dag_runs.c.id == chosen.c.id).outerjoin(
                    runs, runs.c.run_id == dag_runs.c.dagster_run_id
                )
            )
            .order_by(*order, dag_runs.c.id)
        )
        with self.reads.connect() as connection:
            rows = connection.execute(page).mappings().all()
            if offset == 0 and len(rows) < limit:
                total = len(rows)
            elif asks_dagster and rows:
                total = rows[0]["total"]
            else:
                source = _RUNS if asks_dagster else dag_runs
                total = connection.execute(sa.select(sa.func.count()).select_from(source).where(condition)).scalar_one()
        return [_dag_run(row) for row in rows], total

    def latest(self, dag_ids: Sequence[str], count: int) -> dict[str, list[DagRun]]:
        """Return the newest DAG runs of each DAG in one query, newest first; those without runs are left out.

        Args:
            dag_ids: ids of DAGs.
            count: runs at most of each.
        """
        self.take_up()
        mine = (
            sa.select(*_RUN_COLUMNS)
            .select_from(_RUNS)
            .where(dag_runs.c.dag_id == sa.column("wanted", sa.Text))
            .order_by(dag_runs.c.id.desc())
            .limit(count)
            .lateral("mine")
        )
        wanted = sa.func.unnest(sa.cast(list(dag_ids), ARRAY(sa.Text))).table_valued("wanted").render_derived()
        query = sa.select(mine).select_from(wanted.join(mine, sa.true())).order_by(mine.c.id.desc())
        found: dict[str, list[DagRun]] = {}
        with self.reads.connect() as connection:
            for row in connection.execute(query).mappings():
                found.setdefault(row["dag_id"], []).append(_dag_run(row))
        return found

    def get_run(self, dag_id: str, run_id: str) -> DagRun | None:
        """Return one DAG run, None where there is none."""
        # there is one at most, and a page that is not full needs no count
        found, _ = self.list_runs(RunFilter(dag_ids=[dag_id], run_ids=[run_id]), limit=2)
        return found[0] if found else None

    def find(self, dagster_run_id: str) -> DagRun | None:
        """Return the DAG run that a Dagster run belongs to."""
        self.take_up()
        query = (
            sa.select(*_RUN_COLUMNS)
            .select_from(_RUNS.join(run_attempts, run_attempts.c.dag_run == dag_runs.c.id))
            .where(run_attempts.c.dagster_run_id == dagster_run_id)
        )
        with self.reads.connect() as connection:
            row = connection.execute(query).mappings().first()
        return _dag_run(row) if row is not None else None

    def attempts(self, run: DagRun) -> list[str]:
        """Return the Dagster runs behind a DAG run, oldest first."""
        query = (
            sa.select(run_attempts.c.dagster_run_id)
            .where(run_attempts.c.dag_run == run.id)
            .order_by(run_attempts.c.number)
        )
        with self.reads.connect() as connection:
            return list(connection.execute(query).scalars())

    def counts(self, dag_ids: Sequence[str] | None = None) -> dict[tuple[str, str], int]:
        """Return the number of DAG runs by (DAG, state)."""
        self.take_up()
        state = RUN_STATE.label("state")
        query = (
            sa.select(dag_runs.c.dag_id, state, sa.func.count())
            .select_from(_RUNS)
            .where(_run_condition(RunFilter(dag_ids=dag_ids)))
            .group_by(dag_runs.c.dag_id, state)
        )
        with self.reads.connect() as connection:
            return {(dag_id, name): count for dag_id, name, count in connection.execute(query)}

    # --- task instances ---------------------------------------------------------------------------------------------

    def list_tasks(
        self, wanted: TaskFilter, *, limit: int = 100, offset: int = 0, order_by: Sequence[str] = ()
    ) -> tuple[list[TaskInstance], int]:
        """Return a page of task instances, by run and then in the order of the DAG, and how many there are in all.

        Raises:
            KeyError: `order_by` names something that task instances cannot be ordered by.
        """
        self.take_up()
        self.project(wanted.runs)
        condition = _task_condition(wanted)
        source = task_instances.join(dag_runs, dag_runs.c.id == task_instances.c.dag_run).outerjoin(
            runs, runs.c.run_id == dag_runs.c.dagster_run_id
        )
        mine = [task_instances.c[name].label(f"ti_{name}") for name in _TASK_COLUMNS]
        order = [_ordered(TASK_ORDER, name) for name in order_by]
        page = (
            sa.select(*_RUN_COLUMNS, TASK_STATE.label("ti_state"), *mine)
            .select_from(source)
            .where(condition)
            .order_by(*order, dag_runs.c.id, task_instances.c.position)
            .limit(limit)
            .offset(offset)
        )
        with self.reads.connect() as connection:
            rows = connection.execute(page).mappings().all()
            if offset == 0 and len(rows) < limit:
                total = len(rows)
            else:
                total = connection.execute(
                    sa.select(sa.func.count()).select_from(source).where(condition)
                ).scalar_one()  # fmt: skip
        return [_task_instance(row) for row in rows], total

    def tasks_of(self, run: DagRun) -> dict[str, TaskInstance]:
        """Return the task instances of one run by task id."""
        found, _ = self.list_tasks(
            TaskFilter(runs=RunFilter(dag_ids=[run.dag_id], run_ids=[run.run_id])), limit=10_000
        )  # fmt: skip
        return {one.task_id: one for one in found}

    def tries(self, run: DagRun, task_id: str) -> list[TaskTry]:
        """Return the attempts at a task of a run, oldest first."""
        self.project(RunFilter([run.dag_id], [run.run_id]))
        query = (
            sa.select(task_tries)
            .where(task_tries.c.dag_run == run.id, task_tries.c.task_id == task_id)
            .order_by(task_tries.c.try_number)
        )
        with self.reads.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            TaskTry(
                row["task_id"], row["try_number"], row["state"], _utc(row["start_date"]), _utc(row["end_date"]),
                row["dagster_run_id"],
            )
            for row in rows
        ]  # fmt: skip

    # --- taking up what Dagster has ---------------------------------------------------------------------------------

    def take_up(self) -> int:
        """Make DAG runs of the Dagster runs that have none yet; return how many."""
        self.prepare()
        dags = self._catalog().dags
        made = 0
        while True:
            with self.reads.connect() as connection:
                if self._newest == 0 and not has_dagster(connection):
                    return 0
                newest = connection.execute(sa.select(sa.func.max(runs.c.id))).scalar() or 0
            if newest == self._newest:
                return made
            with self.engine.begin() as connection:
                absent = (
                    sa.select(
                        runs.c.id, runs.c.run_id, runs.c.pipeline_name, runs.c.create_timestamp, runs.c.run_body
                    )
                    .select_from(
                        runs.outerjoin(run_attempts, run_attempts.c.dagster_run_id == runs.c.run_id)
                    )
                    .where(
                        runs.c.id > self._newest - _LOOK_BACK,
                        run_attempts.c.dagster_run_id.is_(None),
                        runs.c.pipeline_name.in_(list(dags)),
                    )
                    .order_by(runs.c.id)
                    .limit(_CHUNK)
                )  # fmt: skip
                rows = connection.execute(absent).mappings().all()
                if rows:
                    _add(connection, rows, dags)
                    made += len(rows)
                if len(rows) < _CHUNK:
                    self._newest = newest
                    return made

    def project(self, only: RunFilter | None = None) -> int:
        """Bring the task instances of runs that may have changed up to date; return of how many runs.

        Args:
            only: looks at no runs but those of its DAGs and ids.
        """
        dags = self._catalog().dags
        wanted = _run_condition(RunFilter(only.dag_ids, only.run_ids) if only else RunFilter())
        done = 0
        while True:
            query = (
                sa.select(dag_runs.c.id, dag_runs.c.dag_id, dag_runs.c.created_at, dag_runs.c.projected_event)
                .where(dag_runs.c.projected_final.is_(False), dag_runs.c.dag_id.in_(list(dags)), wanted)
                .order_by(dag_runs.c.id)
                .limit(_CHUNK)
                .offset(done)
            )
            with self.reads.connect() as connection:
                rows = connection.execute(query).mappings().all()
            if not rows:
                return done
            with self.engine.begin() as connection:
                final = _project(connection, rows, dags)
            if len(rows) < _CHUNK:
                return done + len(rows)
            done += len(rows) - final


TASK_ORDER: dict[str, Any] = {
    "start_date": task_instances.c.start_date,
    "end_date": task_instances.c.end_date,
    "duration": task_instances.c.duration,
    "state": TASK_STATE,
    "task_id": task_instances.c.task_id,
    "execution_date": dag_runs.c.logical_date,
    "map_index": sa.literal(-1),
}
"""What task instances can be ordered by."""

_TASK_COLUMNS = (
    "task_id", "start_date", "end_date", "duration", "try_number", "max_tries", "pool", "queued_when", "note",
)  # fmt: skip


def run_id_for(run_type: str, logical: datetime) -> str:
    """Return the id that Airflow gives a run: ``scheduled__2025-10-25T00:00:00+00:00``."""
    return f"{run_type}__{logical.isoformat()}"


def _add(connection: Connection, rows: Iterable[RowMapping], dags: Mapping[str, Dag]) -> None:
    rows = list(rows)
    tags: dict[str, dict[str, str]] = {}
    found = connection.execute(
        sa.select(run_tags.c.run_id, run_tags.c.key, run_tags.c.value).where(
            run_tags.c.run_id.in_([row["run_id"] for row in rows]), run_tags.c.key.in_(_TAGS)
        )
    )
    for run_id, key, value in found:
        tags.setdefault(run_id, {})[key] = value
    for row in rows:
        mine = tags.get(row["run_id"], {})
        parent = mine.get(PARENT_TAG) or mine.get(ROOT_TAG)
        if parent and _attach(connection, parent, row["run_id"]):
            continue
        _insert(connection, dags[row["pipeline_name"]], row, mine)


def _attach(connection: Connection, parent: str, dagster_run_id: str) -> bool:
    """Make a re-execution an attempt of its parent's DAG run; False where the parent has none."""
    dag_run = connection.execute(
        sa.select(run_attempts.c.dag_run).where(run_attempts.c.dagster_run_id == parent)
    ).scalar()  # fmt: skip
    if dag_run is None:
        return False
    add_attempt(connection, dag_run, dagster_run_id)
    return True


def add_attempt(connection: Connection, dag_run: int, dagster_run_id: str) -> None:
    """Note a further Dagster run of a DAG run; it is the one whose state counts from now on."""
    connection.execute(sa.select(dag_runs.c.id).where(dag_runs.c.id == dag_run).with_for_update())
    number = connection.execute(
        sa.select(sa.func.coalesce(sa.func.max(run_attempts.c.number), 0)).where(run_attempts.c.dag_run == dag_run)
    ).scalar_one()
    added = connection.execute(
        insert(run_attempts)
        .values(dagster_run_id=dagster_run_id, dag_run=dag_run, number=number + 1)
        .on_conflict_do_nothing()
    )
    if added.rowcount:
        connection.execute(
            dag_runs.update()
            .where(dag_runs.c.id == dag_run)
            .values(dagster_run_id=dagster_run_id, state_set=None, projected_final=False)
        )


def _insert(connection: Connection, dag: Dag, row: RowMapping, tags: Mapping[str, str]) -> None:
    created = row["create_timestamp"].replace(tzinfo=UTC)
    if SCHEDULE_TAG in tags and TICK_TAG in tags:
        tick = datetime.fromisoformat(tags[TICK_TAG]).astimezone(UTC)
        run_type, interval = "scheduled", dag.interval_before(tick)
        logical = interval[0]
    else:
        run_type = (
            "backfill" if BACKFILL_TAG in tags else "dataset_triggered" if SENSOR_TAG in tags else "manual"
        )  # fmt: skip
        logical, interval = created, dag.manual_interval(created)
    run_id = tags.get(RUN_ID_TAG) or run_id_for(run_type, logical)
    values = {
        "dag_id": dag.dag_id,
        "run_id": run_id,
        "dagster_run_id": row["run_id"],
        "logical_date": logical,
        "data_interval_start": interval[0],
        "data_interval_end": interval[1],
        "run_type": run_type,
        "external_trigger": run_type == "manual",
        "conf": _conf(tags.get(CONF_TAG), row["run_body"]),
        "created_at": created,
    }
    for attempt in (run_id, f"{run_id}__{row['run_id'][:8]}", f"{run_id}__{row['run_id']}"):
        made = connection.execute(
            insert(dag_runs).values({**values, "run_id": attempt}).on_conflict_do_nothing().returning(dag_runs.c.id)
        ).scalar()
        if made is not None:
            connection.execute(
                insert(run_attempts)
                .values(dagster_run_id=row["run_id"], dag_run=made, number=1)
                .on_conflict_do_nothing()
            )
            return
        known = sa.select(dag_runs.c.id).where(dag_runs.c.dagster_run_id == row["run_id"])
        if connection.execute(known).scalar() is not None:  # another process was faster
            return


def _conf(tag: str | None, body: str) -> dict[str, Any]:
    """Return the conf of a run: its tag, else what its run config gives the resource ``pipeline``."""
    try:
        if tag:
            return dict(json.loads(tag))
        config = (json.loads(body).get("run_config") or {}).get("resources", {}).get("pipeline", {}).get("config", {})
    except (ValueError, AttributeError, TypeError):
        return {}
    conf = dict(config.get("conf") or {}) if isinstance(config, dict) else {}
    for name in ("trial", "source"):
        if isinstance(config, dict) and config.get(name):
            conf.setdefault(name, config[name])
    return conf


def _project(connection: Connection, rows: Sequence[RowMapping], dags: Mapping[str, Dag]) -> int:
    """Write the task instances of runs whose events are newer than what is written; return how many are final now."""
    if not rows:
        return 0
    by_id = {row["id"]: row for row in rows}
    attempts = connection.execute(
        sa.select(
            run_attempts.c.dag_run, run_attempts.c.dagster_run_id, run_attempts.c.number, runs.c.status,
            runs.c.start_time, runs.c.end_time, runs.c.create_timestamp,
        )
        .select_from(run_attempts.join(runs, runs.c.run_id == run_attempts.c.dagster_run_id))
        .where(run_attempts.c.dag_run.in_(list(by_id)))
        .order_by(run_attempts.c.dag_run, run_attempts.c.number)
    ).mappings().all()  # fmt: skip
    wanted = [row["dagster_run_id"] for row in attempts]
    events: dict[str, list[Event]] = {}
    newest: dict[str, int] = {}
    if wanted:
        found = connection.execute(
            sa.select(
                event_logs.c.id, event_logs.c.run_id, event_logs.c.dagster_event_type, event_logs.c.step_key,
                event_logs.c.timestamp,
            )
            .where(
                event_logs.c.run_id.in_(wanted),
                event_logs.c.dagster_event_type.in_(STEP_EVENTS),
            )
            .order_by(event_logs.c.id)
        )  # fmt: skip
        for event_id, run_id, kind, step, at in found:
            if step:
                events.setdefault(run_id, []).append(Event(kind, step, at.replace(tzinfo=UTC)))
            newest[run_id] = event_id
    grouped: dict[int, list[Any]] = {}
    for row in attempts:
        grouped.setdefault(row["dag_run"], []).append(row)
    now = datetime.now(UTC)
    instances: list[dict[str, Any]] = []
    all_tries: list[dict[str, Any]] = []
    final = 0
    for dag_run, row in by_id.items():
        mine = [_attempt(one, events.get(one["dagster_run_id"], [])) for one in grouped.get(dag_run, ())]
        ended = bool(mine) and RUN_STATES.get(mine[-1].status) in ("success", "failed") and mine[-1].end is not None
        stamp = max((newest.get(one.dagster_run, 0) for one in mine), default=0) * 16 + _phase(mine)
        if stamp == row["projected_event"] and not ended:
            continue
        dag = dags[row["dag_id"]]
        for position, state in enumerate(task_states(dag, mine, row["created_at"]).values()):
            task = dag.tasks[state.task_id]
            instances.append(
                {
                    "dag_run": dag_run, "task_id": state.task_id, "position": position, "state": state.state,
                    "start_date": state.start, "end_date": state.end, "duration": state.duration,
                    "try_number": len(state.tries), "max_tries": task.retries, "pool": task.pool,
                    "queued_when": state.queued, "updated_at": state.end or state.start or now,
                }
            )  # fmt: skip
            all_tries += [
                {
                    "dag_run": dag_run, "task_id": state.task_id, "try_number": one.number, "state": one.state,
                    "start_date": one.start, "end_date": one.end, "dagster_run_id": one.dagster_run,
                }
                for one in state.tries
            ]  # fmt: skip
        final += ended
        connection.execute(
            dag_runs.update()
            .where(dag_runs.c.id == dag_run)
            .values(projected_event=stamp, projected_final=ended)
        )  # fmt: skip
    _upsert(connection, task_instances, instances, ("dag_run", "task_id"))
    _upsert(connection, task_tries, all_tries, ("dag_run", "task_id", "try_number"))
    return final


def _phase(attempts: Sequence[Attempt]) -> int:
    """Tell apart the states of a run that no step event marks."""
    if not attempts:
        return 15
    return list(RUN_STATES).index(attempts[-1].status) if attempts[-1].status in RUN_STATES else 14


def _attempt(row: Any, events: Sequence[Event]) -> Attempt:
    return Attempt(
        dagster_run=row["dagster_run_id"],
        status=row["status"],
        created=row["create_timestamp"].replace(tzinfo=UTC),
        start=_epoch(row["start_time"]),
        end=_epoch(row["end_time"]),
        events=events,
    )


def _upsert(connection: Connection, table: sa.Table, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    for start in range(0, len(rows), 2000):
        chunk = rows[start : start + 2000]
        statement = insert(table).values(chunk)
        changed = {name: statement.excluded[name] for name in chunk[0] if name not in key}
        connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=changed))


def _ordered(columns: Mapping[str, Any], name: str) -> Any:
    column = columns[name.removeprefix("-")]
    if isinstance(column, sa.Column) and not column.nullable:  # so written, an index can give the order
        return column.desc() if name.startswith("-") else column.asc()
    return column.desc().nulls_last() if name.startswith("-") else column.asc().nulls_first()


_RUN_RANGES: dict[str, Any] = {
    "execution_date": dag_runs.c.logical_date, "start_date": START_DATE, "end_date": END_DATE, "updated_at": UPDATED_AT,
}  # fmt: skip
_TASK_RANGES: dict[str, Any] = {
    "start_date": task_instances.c.start_date,
    "end_date": task_instances.c.end_date,
    "updated_at": task_instances.c.updated_at,
    "duration": task_instances.c.duration,
}


def _bounds(columns: Mapping[str, Any], ranges: Mapping[tuple[str, str], Any]) -> list[Any]:
    return [
        columns[name] >= value if side == "gte" else columns[name] <= value for (name, side), value in ranges.items()
    ]


def _run_condition(wanted: RunFilter) -> Any:
    conditions: list[Any] = [sa.true(), *_bounds(_RUN_RANGES, wanted.ranges)]
    if wanted.dag_ids is not None:
        conditions.append(dag_runs.c.dag_id.in_(list(wanted.dag_ids)))
    if wanted.run_ids is not None:
        conditions.append(dag_runs.c.run_id.in_(list(wanted.run_ids)))
    if wanted.states:
        conditions.append(_in_states(wanted.states))
    return sa.and_(*conditions)


def _in_states(states: Sequence[str]) -> Any:
    """Say of :data:`RUN_STATE` that it is one of `states`, in the way that takes the database least time."""
    statuses = [status for status, state in RUN_STATES.items() if state in states]
    given: Any = runs.c.status.in_(statuses)
    if "queued" in states:
        given = sa.or_(given, runs.c.status.is_(None))
    return sa.or_(dag_runs.c.state_set.in_(list(states)), sa.and_(dag_runs.c.state_set.is_(None), given))


def _task_condition(wanted: TaskFilter) -> Any:
    conditions: list[Any] = [_run_condition(wanted.runs), *_bounds(_TASK_RANGES, wanted.ranges)]
    if wanted.task_ids is not None:
        conditions.append(task_instances.c.task_id.in_(list(wanted.task_ids)))
    if wanted.pools:
        conditions.append(task_instances.c.pool.in_(list(wanted.pools)))
    if wanted.states:
        named = [state for state in wanted.states if state is not None]
        either = [TASK_STATE.in_(named)] if named else []
        if None in wanted.states:
            either.append(TASK_STATE.is_(None))
        conditions.append(sa.or_(*either))
    return sa.and_(*conditions)


def _dag_run(row: RowMapping) -> DagRun:
    return DagRun(
        id=row["id"],
        dag_id=row["dag_id"],
        run_id=row["run_id"],
        dagster_run_id=row["dagster_run_id"],
        logical_date=_sure(row["logical_date"]),
        data_interval_start=_sure(row["data_interval_start"]),
        data_interval_end=_sure(row["data_interval_end"]),
        run_type=row["run_type"],
        external_trigger=row["external_trigger"],
        state=row["state"],
        start_date=_utc(row["start_date"]),
        end_date=_utc(row["end_date"]),
        updated_at=_sure(row["updated_at"]),
        created_at=_sure(row["created_at"]),
        conf=row["conf"],
        note=row["note"],
        held=row["held"],
    )


def _task_instance(row: RowMapping) -> TaskInstance:
    return TaskInstance(
        run=_dag_run(row),
        task_id=row["ti_task_id"],
        state=row["ti_state"],
        start_date=_utc(row["ti_start_date"]),
        end_date=_utc(row["ti_end_date"]),
        duration=row["ti_duration"],
        try_number=row["ti_try_number"],
        max_tries=row["ti_max_tries"],
        pool=row["ti_pool"],
        queued_when=_utc(row["ti_queued_when"]),
        note=row["ti_note"],
    )


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


def _sure(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


def _epoch(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
