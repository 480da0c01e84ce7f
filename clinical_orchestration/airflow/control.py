"""What changes runs and switches: trigger, hold, clear, end, delete, pause, all by way of Dagster's own API."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from clinical_orchestration.airflow.catalog import Catalog, Dag, dags_of
from clinical_orchestration.airflow.database import dag_runs, instigators, paused_dags, run_attempts, task_instances
from clinical_orchestration.airflow.runs import CONF_TAG, RUN_ID_TAG, DagRun, RunBook, add_attempt, run_id_for
from clinical_orchestration.airflow.states import FAILED, FINISHED, QUEUED, RUNNING, SUCCESS
from clinical_orchestration.contract import PIPELINES

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from dagster import DagsterInstance, DagsterRun
    from dagster._core.remote_representation.external import RemoteJob
    from dagster._core.workspace.context import WorkspaceProcessContext, WorkspaceRequestContext

_logger = logging.getLogger("clinical_orchestration.airflow")
_CONTRACT = frozenset(pipeline.name for pipeline in PIPELINES)


class AirflowError(Exception):
    """What Airflow answers when something cannot be done; `args[0]` is the text."""


class UnknownError(AirflowError):
    """There is no such thing."""


class ConflictError(AirflowError):
    """It is there already."""


class RefusedError(AirflowError):
    """The request makes no sense, or not now."""


@dataclass(frozen=True)
class Switch:
    """Whether a DAG is paused, and its next tick (None when paused or without a schedule)."""

    paused: bool
    next_tick: datetime | None


class Control:
    """Changes to DAGs and their runs.

    Args:
        context: returns the open workspace, or None while it is not open.
        engine: database of the instance.
        starter: starts what is triggered after :meth:`trigger` has stored it and returned, as Airflow's scheduler does;
            whoever gives one calls :meth:`release_held` now and then, which starts what was left when a process ended.
            None: a run is started before `trigger` returns.
    """

    def __init__(
        self,
        context: Callable[[], WorkspaceProcessContext | None],
        engine: sa.Engine,
        starter: Executor | None = None,
    ) -> None:
        self._context = context
        self._starter = starter
        self._catalog = Catalog()
        self._version: Any = None
        self._plans: dict[tuple[Any, str], Any] = {}
        self._lock = threading.Lock()
        self.runs = RunBook(engine, self.catalog)
        self._engine = engine

    # --- what there is ----------------------------------------------------------------------------------------------

    def catalog(self) -> Catalog:
        """Return the DAGs as the workspace has them now; built once for each version of the workspace.

        Raises:
            RefusedError: the workspace is not open yet.
        """
        request = self._request()
        entries = request.get_code_location_entries()
        version = tuple((name, entry.version_key, entry.load_status.value) for name, entry in sorted(entries.items()))
        if version == self._version:
            return self._catalog
        with self._lock:
            if version != self._version:
                self._catalog = _read_catalog(entries)
                self._plans.clear()
                self._version = version
        return self._catalog

    def dag(self, dag_id: str) -> Dag:
        """Return a DAG.

        Raises:
            UnknownError: there is none of this id.
        """
        found = self.catalog().dags.get(dag_id)
        if found is None:
            raise UnknownError(f"The DAG with dag_id: {dag_id} was not found")
        return found

    def run(self, dag_id: str, run_id: str) -> DagRun:
        """Return a DAG run.

        Raises:
            UnknownError: there is none.
        """
        found = self.runs.get_run(dag_id, run_id)
        if found is None:
            raise UnknownError(f"DAGRun with DAG ID: '{dag_id}' and DagRun ID: '{run_id}' not found")
        return found

    def reload(self, location: str) -> None:
        """Load a code location again."""
        context = self._context()
        if context is None:
            raise RefusedError("The Dagster workspace is not open yet; this needs the database")
        context.reload_code_location(location)

    # --- switches ---------------------------------------------------------------------------------------------------

    def switches(self, dags: Iterable[Dag]) -> dict[str, Switch]:
        """Return for each DAG whether it is paused and when it fires next."""
        self.runs.prepare()
        request = self._request()
        states = {
            state.instigator_name: state.status.value for state in request.instance.all_instigator_state()
        }  # fmt: skip
        with self.runs.reads.connect() as connection:
            paused = set(connection.execute(sa.select(paused_dags.c.dag_id)).scalars())
        now = datetime.now(UTC)
        result = {}
        for dag in dags:
            stopped = dag.dag_id in paused
            if dag.schedule_name is not None:
                status = states.get(dag.schedule_name)
                stopped = (
                    not self._default_running(dag) if status in (None, "DECLARED_IN_CODE") else status != "RUNNING"
                )
            result[dag.dag_id] = Switch(stopped, None if stopped else dag.next_tick(now))
        return result

    def version(self) -> tuple[Any, ...]:
        """Return what changes when a code location is loaded anew or a DAG is paused or unpaused, by whomever.

        One small query; what the DAGs look like follows from it and the time of day.
        """
        self.runs.prepare()
        self.catalog()
        with self.runs.reads.connect() as connection:
            return self._version, *connection.execute(_SWITCHES).one()

    def set_paused(self, dag: Dag, paused: bool) -> None:
        """Pause a DAG: its schedule and the sensors that start it are stopped; or the other way round.

        What was triggered while it was paused is started when it is unpaused.
        """
        self.runs.prepare()
        request = self._request()
        instance = request.instance
        repository = request.get_code_location(dag.location).get_repository(dag.repository)
        for schedule in repository.get_schedules():
            if schedule.name == dag.schedule_name:
                if paused:
                    instance.stop_schedule(schedule.get_remote_origin_id(), schedule.selector_id, schedule)
                else:
                    instance.start_schedule(schedule)
        for sensor in repository.get_sensors():
            if sensor.name in dag.sensor_names:
                if paused:
                    instance.stop_sensor(sensor.get_remote_origin_id(), sensor.selector_id, sensor)
                elif sensor.default_status.value == "RUNNING":
                    instance.start_sensor(sensor)
        with self._engine.begin() as connection:
            if paused:
                values = {"dag_id": dag.dag_id, "paused_at": datetime.now(UTC)}
                connection.execute(insert(paused_dags).values(values).on_conflict_do_nothing())
            else:
                connection.execute(paused_dags.delete().where(paused_dags.c.dag_id == dag.dag_id))
        if not paused:
            self.release_held()

    # --- runs -------------------------------------------------------------------------------------------------------

    def trigger(
        self,
        dag: Dag,
        *,
        run_id: str | None = None,
        logical_date: datetime | None = None,
        interval: tuple[datetime, datetime] | None = None,
        conf: Mapping[str, Any] | None = None,
        note: str | None = None,
        run_type: str = "manual",
        user: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> DagRun:
        """Start a run of a DAG; of a paused one it waits, queued, until the DAG is unpaused.

        Raises:
            ConflictError: there is a run of this id, or of this logical date.
            RefusedError: Dagster refuses it.
        """
        from dagster._core.utils import make_new_run_id

        self.runs.take_up()
        now = datetime.now(UTC)
        logical = logical_date or now
        start, end = interval or dag.manual_interval(logical)
        name = run_id or run_id_for(run_type, logical)
        tags = {**(tags or {}), **({"user": user} if user else {})}
        held = self.switches([dag])[dag.dag_id].paused
        values = {
            "dag_id": dag.dag_id, "run_id": name, "dagster_run_id": make_new_run_id(), "logical_date": logical,
            "data_interval_start": start, "data_interval_end": end, "run_type": run_type,
            "external_trigger": run_type == "manual", "conf": dict(conf or {}), "note": note, "created_at": now,
            "held": True,
        }  # fmt: skip
        with self._engine.begin() as connection:
            if logical_date is not None:
                same = sa.select(dag_runs.c.id).where(
                    dag_runs.c.dag_id == dag.dag_id, dag_runs.c.logical_date == logical
                )
                if connection.execute(same).first() is not None:
                    raise ConflictError(
                        f"DAGRun with DAG ID: '{dag.dag_id}' and DAGRun logical date: '{logical.isoformat()}' "
                        "already exists"
                    )
            try:
                made = connection.execute(dag_runs.insert().values(values).returning(dag_runs.c.id)).scalar_one()
            except IntegrityError:
                raise ConflictError(
                    f"DAGRun with DAG ID: '{dag.dag_id}' and DAGRun ID: '{name}' already exists"
                ) from None
            connection.execute(
                run_attempts.insert().values(dagster_run_id=values["dagster_run_id"], dag_run=made, number=1)
            )
        if not held and self._starter is not None and dag.dag_id in _CONTRACT:  # their run config is always valid
            self._starter.submit(self._start, made, tags)
        elif not held:
            try:
                self._launch_held(made, tags)
            except Exception:
                with self._engine.begin() as connection:
                    connection.execute(dag_runs.delete().where(dag_runs.c.id == made, dag_runs.c.held.is_(True)))
                raise
        return self.run(dag.dag_id, name)

    def _start(self, dag_run: int, tags: Mapping[str, str]) -> None:
        try:
            self._launch_held(dag_run, tags)
        except Exception as error:  # it stays queued, and release_held tries again
            _logger.warning("a triggered run cannot be started now: %s", type(error).__name__)

    def _started(self, run: DagRun) -> DagRun:
        """Return a run that is about to be started after it was; one that waits for its DAG as it is."""
        if not run.held or self.switches([self.dag(run.dag_id)])[run.dag_id].paused:
            return run
        if not self._launch_held(run.id):  # another thread is at it: its lock is gone when the run has started
            with self._engine.begin() as connection:
                connection.execute(sa.select(dag_runs.c.id).where(dag_runs.c.id == run.id).with_for_update())
        return self.run(run.dag_id, run.run_id)

    def release_held(self) -> int:
        """Start what was triggered while its DAG was paused and is not any more; return how many runs."""
        self.runs.prepare()
        with self.runs.reads.connect() as connection:
            query = sa.select(dag_runs.c.id, dag_runs.c.dag_id).where(dag_runs.c.held).order_by(dag_runs.c.id)
            waiting = connection.execute(query).all()
        if not waiting:
            return 0
        dags = self.catalog().dags
        switches = self.switches([dags[dag_id] for dag_id in {dag_id for _, dag_id in waiting} if dag_id in dags])
        ready = [made for made, dag_id in waiting if dag_id in switches and not switches[dag_id].paused]
        return sum(self._launch_held(made) for made in ready)

    def _launch_held(self, dag_run: int, tags: Mapping[str, str] | None = None) -> bool:
        """Launch a run that is noted and not launched; False when another process does so."""
        with self._engine.begin() as connection:
            row = (
                connection.execute(
                    sa.select(dag_runs)
                    .where(dag_runs.c.id == dag_run, dag_runs.c.held)
                    .with_for_update(skip_locked=True)
                )
                .mappings()
                .first()
            )
            if row is None:
                return False
            request = self._request()
            instance = request.instance
            dag = self.dag(row["dag_id"])
            # its id is given, so that a crash between launch and commit launches nothing twice
            if not instance.has_run(row["dagster_run_id"]):
                self._create(
                    request,
                    dag,
                    run_id=row["dagster_run_id"],
                    config=run_config(dag, row["conf"]),
                    tags={
                        **(tags or {}), RUN_ID_TAG: row["run_id"], CONF_TAG: orjson.dumps(row["conf"]).decode(),
                    },
                )  # fmt: skip
                instance.submit_run(row["dagster_run_id"], request)
            connection.execute(dag_runs.update().where(dag_runs.c.id == dag_run).values(held=False))
        return True

    def clear(self, run: DagRun, tasks: Sequence[str] | None = None) -> DagRun:
        """Execute a finished run again, all of it or some of its tasks; it stays the same DAG run.

        Raises:
            RefusedError: the run has not ended, or none of the tasks is a step.
        """
        from dagster._core.execution.plan.state import KnownExecutionState
        from dagster._core.utils import make_new_run_id

        dag = self.dag(run.dag_id)
        run = self._started(run)
        if run.held:
            return run
        request = self._request()
        instance = request.instance
        parent = instance.get_run_by_id(run.dagster_run_id)
        if parent is None or not parent.is_finished:
            raise RefusedError(f"The run {run.run_id} has not ended; set it to failed first, then clear it")
        steps = None
        known = None
        if tasks is not None:
            steps = [step for name in tasks if (step := dag.tasks[name].step) is not None]
            if not steps:
                raise RefusedError("The start and end markers stand for the run itself; clear the run or other tasks")
            known = KnownExecutionState.build_for_reexecution(instance, parent).update_for_step_selection(steps)
        again = make_new_run_id()
        self._create(
            request, dag, run_id=again, config=parent.run_config,
            tags={
                key: value
                for key, value in parent.tags.items()
                if not key.startswith((".dagster/", "dagster/")) or key.startswith("dagster/asset_partition_range")
            },
            parent=parent, steps=steps, known=known,
        )  # fmt: skip
        instance.submit_run(again, request)
        with self._engine.begin() as connection:
            add_attempt(connection, run.id, again)
        return self.run(run.dag_id, run.run_id)

    def set_run_state(self, run: DagRun, state: str) -> DagRun:
        """Set a run to success or failed by hand, or to queued, which clears it.

        A run that has not ended is cancelled in Dagster; its state is then the given one.
        """
        if state == QUEUED:
            return self.clear(run)
        if state not in FINISHED:
            raise RefusedError(f"{state} is no state that a run can be set to")
        run = self._started(run)
        if run.held:
            raise RefusedError(f"The run {run.run_id} waits for its DAG to be unpaused; unpause or delete it")
        if run.state in (QUEUED, RUNNING):
            self._terminate(run.dagster_run_id)
        values = {"state_set": state if state != run.state else None}
        with self._engine.begin() as connection:
            connection.execute(dag_runs.update().where(dag_runs.c.id == run.id).values(values))
        return self.run(run.dag_id, run.run_id)

    def delete(self, run: DagRun) -> None:
        """Delete a run with everything that Dagster keeps of it; an active one is cancelled first."""
        request = self._request()
        run = self._started(run)
        for dagster_run in self.runs.attempts(run):
            if request.instance.has_run(dagster_run):
                if run.state in (QUEUED, RUNNING):
                    self._terminate(dagster_run)
                request.instance.delete_run(dagster_run)
        with self._engine.begin() as connection:
            connection.execute(dag_runs.delete().where(dag_runs.c.id == run.id))

    def set_note(self, run: DagRun, note: str | None, task_id: str | None = None) -> None:
        """Write a note to a run, or to one of its task instances."""
        self.runs.project()
        with self._engine.begin() as connection:
            if task_id is None:
                connection.execute(dag_runs.update().where(dag_runs.c.id == run.id).values(note=note))
            else:
                connection.execute(
                    task_instances.update()
                    .where(task_instances.c.dag_run == run.id, task_instances.c.task_id == task_id)
                    .values(note=note)
                )

    def set_task_states(self, run: DagRun, tasks: Sequence[str], state: str) -> None:
        """Set task instances of a finished run by hand; what Dagster recorded stays in its event log.

        Raises:
            RefusedError: the run has not ended.
        """
        if run.state not in FINISHED:
            raise RefusedError(f"The run {run.run_id} has not ended; tasks of a run that works cannot be set by hand")
        self.runs.project()
        with self._engine.begin() as connection:
            connection.execute(
                task_instances.update()
                .where(task_instances.c.dag_run == run.id, task_instances.c.task_id.in_(list(tasks)))
                .values(state_set=state)
            )
            left = connection.execute(
                sa.select(sa.func.count())
                .select_from(task_instances)
                .where(
                    task_instances.c.dag_run == run.id,
                    sa.func.coalesce(task_instances.c.state_set, task_instances.c.state, "").not_in(
                        (SUCCESS, "skipped")
                    ),
                )
            ).scalar_one()
            result = FAILED if state == FAILED else SUCCESS if left == 0 else None
            if result is not None:
                connection.execute(dag_runs.update().where(dag_runs.c.id == run.id).values(state_set=result))

    # --- Dagster ----------------------------------------------------------------------------------------------------

    def _request(self) -> WorkspaceRequestContext:
        context = self._context()
        if context is None:
            raise RefusedError("The Dagster workspace is not open yet; this needs the database")
        return context.create_request_context()

    def instance(self) -> DagsterInstance:
        """Return the Dagster instance.

        Raises:
            RefusedError: it is not open yet.
        """
        return self._request().instance

    def _default_running(self, dag: Dag) -> bool:
        repository = self._request().get_code_location(dag.location).get_repository(dag.repository)
        return any(
            schedule.name == dag.schedule_name and schedule.default_status.value == "RUNNING"
            for schedule in repository.get_schedules()
        )

    def _create(
        self,
        request: WorkspaceRequestContext,
        dag: Dag,
        *,
        run_id: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: DagsterRun | None = None,
        steps: Sequence[str] | None = None,
        known: Any = None,
    ) -> DagsterRun:
        from dagster import DagsterRunStatus

        location = request.get_code_location(dag.location)
        repository = location.get_repository(dag.repository)
        job: RemoteJob = repository.get_full_job(dag.dag_id)
        key = (self._version, dag.dag_id)
        plan = self._plans.get(key) if steps is None else None
        if plan is None:
            plan = location.get_execution_plan(
                job, config, step_keys_to_execute=steps, known_state=known, instance=request.instance
            ).execution_plan_snapshot
            if steps is None:  # what is executed does not depend on the config of resources
                self._plans[key] = plan
        lineage = {}
        if parent is not None:
            root = parent.root_run_id or parent.run_id
            lineage = {"dagster/parent_run_id": parent.run_id, "dagster/root_run_id": root}
        return request.instance.create_run(
            job_name=dag.dag_id,
            run_id=run_id,
            run_config=dict(config),
            status=DagsterRunStatus.NOT_STARTED,
            tags={**(job.run_tags or {}), **tags, **lineage},
            root_run_id=lineage.get("dagster/root_run_id"),
            parent_run_id=lineage.get("dagster/parent_run_id"),
            step_keys_to_execute=plan.step_keys_to_execute if steps is not None else None,
            execution_plan_snapshot=plan,
            job_snapshot=job.job_snapshot,
            parent_job_snapshot=job.parent_job_snapshot,
            asset_selection=None,
            asset_check_selection=None,
            resolved_op_selection=job.resolved_op_selection,
            op_selection=None,
            remote_job_origin=job.get_remote_origin(),
            job_code_origin=job.get_python_origin(),
            asset_graph=repository.asset_graph,
        )

    def _terminate(self, dagster_run: str) -> None:
        instance = self.instance()
        run = instance.get_run_by_id(dagster_run)
        if run is None or run.is_finished:
            return
        if not instance.run_coordinator.cancel_run(dagster_run):
            instance.report_run_canceling(run)
            instance.report_run_canceled(run, message="Its worker does not answer; set to its state by hand.")


_SWITCHES = sa.select(
    sa.select(sa.func.string_agg(instigators.c.selector_id + instigators.c.status, sa.literal(" ")))
    .select_from(instigators)
    .scalar_subquery(),
    sa.select(sa.func.string_agg(paused_dags.c.dag_id, sa.literal(" "))).select_from(paused_dags).scalar_subquery(),
)


def run_config(dag: Dag, conf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run config that hands `conf` to the steps of a pipeline; other jobs take it as run config."""
    if dag.dag_id not in _CONTRACT:
        return dict(conf) if set(conf) <= {"ops", "resources", "execution", "loggers"} else {}
    config: dict[str, Any] = {"conf": dict(conf)}
    for name in ("trial", "source"):
        if isinstance(conf.get(name), str):
            config[name] = conf[name]
    return {"resources": {"pipeline": {"config": config}}} if conf else {}


def _read_catalog(entries: Mapping[str, Any]) -> Catalog:
    dags: dict[str, Dag] = {}
    errors = []
    for name, entry in entries.items():
        location = entry.code_location
        if location is None:
            if entry.load_error is not None:
                when = datetime.fromtimestamp(entry.update_timestamp, UTC)
                errors.append((name, entry.load_error.to_string(), when))
            continue
        for repository in location.get_repositories().values():
            jobs = {
                job.name: repository.get_full_job(job.name).job_snapshot
                for job in repository.get_all_jobs()
                if not job.name.startswith("__")
            }
            dags |= {dag.dag_id: dag for dag in dags_of(repository.repository_snap, jobs, location=name)}
    return Catalog(dags, tuple(errors))
