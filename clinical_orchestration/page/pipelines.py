"""Pipelines, schedules and latest runs, as the front page shows them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagster._core.remote_representation.external import RemoteSchedule
    from dagster._core.workspace.context import WorkspaceProcessContext

RUNS_SHOWN = 5
_WORDS = {"SUCCESS": "good", "FAILURE": "bad", "CANCELED": "bad", "STARTED": "busy", "CANCELING": "busy"}


@dataclass(frozen=True)
class RunView:
    """One run; times in UTC, `seconds` its duration (so far, while it runs)."""

    run_id: str
    status: str
    started: datetime | None
    seconds: float | None
    link: str

    @property
    def kind(self) -> str:
        """How to colour the status: good, bad, busy or idle."""
        return _WORDS.get(self.status, "idle")


@dataclass(frozen=True)
class PipelineView:
    """One job with its schedule."""

    name: str
    description: str
    schedule: str | None
    schedule_running: bool
    next_tick: datetime | None
    runs: tuple[RunView, ...]
    link: str


@dataclass(frozen=True)
class PipelinesView:
    """All pipelines, and what keeps a code location from loading."""

    pipelines: tuple[PipelineView, ...]
    problems: tuple[str, ...]


def read_pipelines(context: WorkspaceProcessContext, prefix: str) -> PipelinesView:
    """Read jobs, schedules and the latest runs of every code location.

    Args:
        context: the workspace; its instance is asked for runs and for the state of the schedules.
        prefix: path under which the Dagster UI is mounted.
    """
    pipelines: list[PipelineView] = []
    problems: list[str] = []
    for name, entry in context.create_request_context().get_code_location_entries().items():
        if entry.code_location is None:
            kind = entry.load_error.cls_name if entry.load_error else None
            problems.append(f"Code location {name} is not loaded ({kind or 'it is starting'}).")
            continue
        for repository in entry.code_location.get_repositories().values():
            schedules = {schedule.job_name: schedule for schedule in repository.get_schedules()}
            base = f"{prefix}/locations/{repository.name}@{name}/jobs"
            pipelines += [
                _pipeline(
                    context, job.name, job.description or "", schedules.get(job.name), f"{base}/{job.name}", prefix
                )
                for job in repository.get_all_jobs()
                if not job.name.startswith("__")  # Dagster's own job of all assets
            ]
    return PipelinesView(tuple(sorted(pipelines, key=lambda pipeline: pipeline.name)), tuple(problems))


def _pipeline(
    context: WorkspaceProcessContext,
    name: str,
    description: str,
    schedule: RemoteSchedule | None,
    link: str,
    prefix: str,
) -> PipelineView:
    from dagster import RunsFilter

    instance = context.instance
    records = instance.get_run_records(RunsFilter(job_name=name), limit=RUNS_SHOWN)
    runs = []
    for record in records:
        started = record.start_time
        end = record.end_time or (time.time() if started else None)
        runs.append(
            RunView(
                run_id=record.dagster_run.run_id,
                status=record.dagster_run.status.value,
                started=datetime.fromtimestamp(started, UTC) if started else None,
                seconds=end - started if started and end else None,
                link=f"{prefix}/runs/{record.dagster_run.run_id}",
            )
        )
    running, next_tick, cron = False, None, None
    if schedule is not None:
        cron = schedule.cron_schedule if isinstance(schedule.cron_schedule, str) else ", ".join(schedule.cron_schedule)
        stored = instance.get_instigator_state(schedule.get_remote_origin_id(), schedule.selector_id)
        running = schedule.get_current_instigator_state(stored).is_running
        if running:
            next_tick = next(iter(schedule.execution_time_iterator(time.time())), None)
    return PipelineView(name, description, cron, running, next_tick, tuple(runs), link)
