"""DAGs and their tasks, made from what a code location says about its jobs.

A job is a DAG of the same name. A pipeline of :mod:`clinical_orchestration.contract` has exactly the tasks and edges
that are written there; each working task is the step of the same name, and the ``start_*`` and ``end_*`` markers stand
for the run itself. Any other job has one task a step. Dagster's own jobs (``__ASSET_JOB``) are no DAGs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from clinical_orchestration.contract import OWNER, PIPELINES, RETRIES, RETRY_DELAY_SECONDS, Pipeline

if TYPE_CHECKING:
    from dagster._core.remote_representation.external_data import RepositorySnap
    from dagster._core.snap import JobSnap

DEFAULT_POOL = "default_pool"
DEFAULT_SLOTS = 128
"""What Airflow gives the pool of tasks without one; nothing limits those here."""
MARKERS = ("start_", "end_")


@dataclass(frozen=True)
class Task:
    """One task: a step of the job, or a marker that stands for the start or the end of the run (`step` None)."""

    task_id: str
    step: str | None
    upstream: tuple[str, ...] = ()
    downstream: tuple[str, ...] = ()
    pool: str = DEFAULT_POOL
    retries: int = 0
    retry_delay_seconds: float = 0.0
    trigger_rule: str = "all_success"
    description: str = ""
    assets: tuple[str, ...] = ()
    """Keys of the assets that it makes, ``layer/table``."""
    code: tuple[str, int] | None = None
    """File and line of the function that makes them."""

    @property
    def starts(self) -> bool:
        """Whether it stands for the start of the run."""
        return self.step is None and not self.upstream


@dataclass(frozen=True)
class Dag:
    """One DAG. `schedule_name` is the name of the Dagster schedule that `cron` belongs to."""

    dag_id: str
    description: str
    tags: tuple[str, ...]
    owners: tuple[str, ...]
    tasks: Mapping[str, Task]
    cron: str | None = None
    timezone: str = "UTC"
    schedule_name: str | None = None
    sensor_names: tuple[str, ...] = ()
    location: str = ""
    repository: str = "__repository__"
    files: tuple[str, ...] = ()
    """Files that the code of its assets is in."""
    max_active_runs: int = 16

    @property
    def fileloc(self) -> str:
        """The first of its files."""
        return self.files[0] if self.files else ""

    @cached_property
    def by_step(self) -> dict[str, Task]:
        """Map a step's key to its task."""
        return {task.step: task for task in self.tasks.values() if task.step is not None}

    def ancestors(self, task_id: str) -> set[str]:
        """Return the ids of all tasks before a task."""
        return self._reach(task_id, "upstream")

    def descendants(self, task_id: str) -> set[str]:
        """Return the ids of all tasks after a task."""
        return self._reach(task_id, "downstream")

    def _reach(self, task_id: str, direction: str) -> set[str]:
        found: set[str] = set()
        waiting = list(getattr(self.tasks[task_id], direction))
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(getattr(self.tasks[name], direction))
        return found

    def interval_before(self, tick: datetime) -> tuple[datetime, datetime]:
        """Return the data interval of the run that a tick starts: from the tick before it to the tick.

        A DAG without a schedule has an interval of no length.
        """
        if self.cron is None:
            return tick, tick
        return _previous(self.cron, self.timezone, tick), tick

    def manual_interval(self, logical: datetime) -> tuple[datetime, datetime]:
        """Return the data interval of a run that somebody starts: it ends at the newest tick up to its logical date."""
        if self.cron is None:
            return logical, logical
        end = _previous(self.cron, self.timezone, logical, inclusive=True)
        return _previous(self.cron, self.timezone, end), end

    def next_tick(self, after: datetime) -> datetime | None:
        """Return the first tick after a moment; None without a schedule."""
        if self.cron is None:
            return None
        from dagster._utils.schedules import cron_string_iterator

        for tick in cron_string_iterator(after.timestamp(), self.cron, self.timezone):
            moment = tick.astimezone(UTC)
            if moment > after:
                return moment
        return None


@dataclass(frozen=True)
class Catalog:
    """All DAGs of the loaded code locations, and what keeps others from loading."""

    dags: Mapping[str, Dag] = field(default_factory=dict)
    import_errors: tuple[tuple[str, str, datetime], ...] = ()
    """(code location, text of the error, when)."""
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def dags_of(snapshot: RepositorySnap, jobs: Mapping[str, JobSnap], location: str = "", fileloc: str = "") -> list[Dag]:
    """Return the DAGs of one repository, sorted by id.

    Args:
        snapshot: its schedules, sensors and assets.
        jobs: its jobs by name.
        location: name of its code location.
    """
    contract = {pipeline.name: pipeline for pipeline in PIPELINES}
    schedules = {schedule.job_name: schedule for schedule in snapshot.schedules}
    sensors: dict[str, list[str]] = {}
    for sensor in snapshot.sensors:
        for target in (sensor.target_dict or {}).values():
            sensors.setdefault(target.job_name, []).append(sensor.name)
    assets: dict[tuple[str, str], list[Any]] = {}
    for node in snapshot.asset_nodes:
        for owner in node.job_names or ():
            for step in node.op_names or ():
                assets.setdefault((owner, step), []).append(node)
    dags = []
    for name, job in jobs.items():
        if name.startswith("__"):
            continue
        pipeline = contract.get(name)
        schedule = schedules.get(name)
        cron = schedule.cron_schedule if schedule else None
        steps = {step: assets.get((name, step), []) for step in _steps(job)}
        tasks = _contract_tasks(pipeline, steps) if pipeline else _step_tasks(job, steps)
        dags.append(
            Dag(
                dag_id=name,
                description=job.description or (pipeline.description if pipeline else ""),
                tags=pipeline.tags if pipeline else _airflow_tags(job.tags),
                owners=(OWNER,),
                tasks=tasks,
                cron=cron if isinstance(cron, str) or cron is None else cron[0],
                timezone=(schedule.execution_timezone if schedule else None) or "UTC",
                schedule_name=schedule.name if schedule else None,
                sensor_names=tuple(sorted(sensors.get(name, ()))),
                location=location,
                repository=snapshot.name,
                files=tuple(dict.fromkeys(task.code[0] for task in tasks.values() if task.code is not None)),
            )
        )
    return sorted(dags, key=lambda dag: dag.dag_id)


def _previous(cron: str, timezone: str, moment: datetime, inclusive: bool = False) -> datetime:
    from dagster._utils.schedules import reverse_cron_string_iterator

    for tick in reverse_cron_string_iterator(moment.timestamp() + (1 if inclusive else 0), cron, timezone):
        found = tick.astimezone(UTC)
        if found < moment or (inclusive and found == moment):
            return found
    raise ValueError(f"the cron expression {cron!r} has no tick before {moment.isoformat()}")


def _code(nodes: Iterable[Any]) -> tuple[str, int] | None:
    """Return file and line that the code references of assets name."""
    for node in nodes:
        references = (node.metadata or {}).get("dagster/code_references")
        for one in getattr(references, "code_references", ()):
            path = getattr(one, "file_path", None)
            if path:
                return str(path), int(one.line_number or 1)
    return None


def _steps(job: JobSnap) -> list[str]:
    return [node.node_name for node in job.dep_structure_snapshot.node_invocation_snaps]


def _airflow_tags(tags: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(key.removeprefix("airflow/") for key in tags if key.startswith("airflow/")))


def _contract_tasks(pipeline: Pipeline, steps: Mapping[str, list[Any]]) -> dict[str, Task]:
    return {
        task_id: _task(
            task_id,
            None if task_id.startswith(MARKERS) else task_id,
            steps.get(task_id, []),
            [upstream for upstream, downstream in pipeline.edges if downstream == task_id],
            [downstream for upstream, downstream in pipeline.edges if upstream == task_id],
            retries=0 if task_id.startswith(MARKERS) else RETRIES,
        )
        for task_id in pipeline.tasks
    }


def _step_tasks(job: JobSnap, steps: Mapping[str, list[Any]]) -> dict[str, Task]:
    upstream: dict[str, set[str]] = {}
    for node in job.dep_structure_snapshot.node_invocation_snaps:
        upstream[node.node_name] = {
            output.node_name for entry in node.input_dep_snaps for output in entry.upstream_output_snaps
        }
    return {
        step: _task(
            step,
            step,
            nodes,
            sorted(upstream.get(step, ())),
            sorted(other for other, before in upstream.items() if step in before),
            retries=RETRIES,
        )
        for step, nodes in steps.items()
    }


def _task(
    task_id: str, step: str | None, nodes: list[Any], upstream: Iterable[str], downstream: Iterable[str], retries: int
) -> Task:
    pools = sorted({pool for node in nodes for pool in node.pools or ()})
    above, below = tuple(upstream), tuple(downstream)
    return Task(
        task_id=task_id,
        step=step,
        upstream=above,
        downstream=below,
        pool=pools[0] if pools else DEFAULT_POOL,
        retries=retries,
        retry_delay_seconds=RETRY_DELAY_SECONDS,
        # where branches meet again, the one not taken is no failure
        trigger_rule="none_failed" if step is None and len(above) > 1 else "all_success",
        description=" ".join(node.description for node in nodes if node.description),
        assets=tuple(sorted(node.asset_key.to_user_string() for node in nodes)),
        code=_code(nodes),
    )
