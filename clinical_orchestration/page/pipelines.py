"""Pipelines as the front page shows them: schedule, switch, and the newest runs as bars.

Read through the same view as the API at ``/api/v1``, so that both tell the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

from clinical_orchestration.airflow.states import FAILED, FINISHED, QUEUED, RUNNING
from clinical_orchestration.api.dags import file_token, schedule_interval

if TYPE_CHECKING:
    from clinical_orchestration.airflow.catalog import Dag
    from clinical_orchestration.airflow.control import Control
    from clinical_orchestration.airflow.runs import DagRun

RUNS_SHOWN = 25
BAR_STEPS = 16
"""Heights of bars; the style sheet has a class for each."""


@dataclass(frozen=True)
class Bar:
    """One run; `seconds` is its duration, so far while it runs; `height` 1 to :data:`BAR_STEPS`."""

    run_id: str
    state: str
    started: datetime | None
    seconds: float | None
    height: int
    link: str

    @property
    def text(self) -> str:
        """State, time, duration and id in words."""
        when = f"started {self.started:%Y-%m-%d %H:%M:%S} UTC" if self.started else "not started"
        took = "" if self.seconds is None else f", {duration(self.seconds)}{' so far' if self.state == RUNNING else ''}"
        return f"{self.state}, {when}{took}, {self.run_id}"


@dataclass(frozen=True)
class PipelineView:
    """One pipeline; `bars` oldest first, `links` (label, address) into the Dagster UI."""

    dag_id: str
    description: str
    tags: tuple[str, ...]
    cron: str | None
    every: str
    paused: bool
    next_tick: datetime | None
    bars: tuple[Bar, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def last(self) -> Bar | None:
        """The newest run."""
        return self.bars[-1] if self.bars else None

    @property
    def failing(self) -> bool:
        """Whether the newest run that has ended failed."""
        return next((bar.state == FAILED for bar in reversed(self.bars) if bar.state in FINISHED), False)

    @property
    def working(self) -> int:
        """Runs among those shown that run or wait."""
        return sum(bar.state in (RUNNING, QUEUED) for bar in self.bars)


@dataclass(frozen=True)
class PipelinesView:
    """All pipelines, and what keeps a code location from loading."""

    pipelines: tuple[PipelineView, ...]
    problems: tuple[str, ...]


def read_pipelines(control: Control, prefix: str) -> PipelinesView:
    """Return every pipeline with its switch and newest runs, by name.

    Args:
        control: Airflow's view of the instance.
        prefix: path under which the Dagster UI is mounted.

    Raises:
        RefusedError: the workspace is not open yet.
    """
    catalog = control.catalog()
    switches = control.switches(catalog.dags.values())
    latest = control.runs.latest(list(catalog.dags), RUNS_SHOWN)
    now = datetime.now(UTC)
    return PipelinesView(
        tuple(
            PipelineView(
                dag_id=dag.dag_id,
                description=dag.description,
                tags=dag.tags,
                cron=dag.cron,
                every=_every(dag),
                paused=switches[dag.dag_id].paused,
                next_tick=switches[dag.dag_id].next_tick,
                bars=bars_of(latest.get(dag.dag_id, ()), now),
                links=dag_links(dag, prefix),
            )
            for dag in sorted(catalog.dags.values(), key=lambda dag: dag.dag_id)
        ),
        tuple(
            f"Code location {name} is not loaded: {(text.strip().splitlines() or ['unknown error'])[0]}"
            for name, text, _ in catalog.import_errors
        ),
    )


def bars_of(runs: Sequence[DagRun], now: datetime) -> tuple[Bar, ...]:
    """Return runs, newest first, as bars, oldest first; the longest one is the highest."""
    seconds = [
        ((run.end_date or now) - run.start_date).total_seconds() if run.start_date is not None else None for run in runs
    ]
    longest = max((one for one in seconds if one is not None), default=0.0) or 1.0
    return tuple(
        Bar(
            run.run_id,
            run.state,
            run.start_date,
            took,
            max(1, round(BAR_STEPS * (took or 0.0) / longest)),
            run_link(run.dag_id, run.run_id),
        )
        for run, took in zip(reversed(runs), reversed(seconds), strict=True)
    )


def run_link(dag_id: str, run_id: str) -> str:
    """Return the address of a run's page."""
    return f"/runs/{quote(dag_id, safe='')}/{quote(run_id, safe='')}"


def dag_links(dag: Dag, prefix: str) -> tuple[tuple[str, str], ...]:
    """Return (label, address) of the graph, runs and assets in the Dagster UI, and of the code."""
    # the UI splits the place at its @ before it decodes it
    place = f"{prefix}/locations/{quote(f'{dag.repository}@{dag.location}', safe='@')}"
    job = f"{place}/jobs/{quote(dag.dag_id)}"
    return (
        ("Graph", job), ("Runs", f"{job}/runs"), ("Assets", f"{place}/assets"),
        ("Code", f"/api/v1/dagSources/{file_token(dag)}"),
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Return a span in its two largest units: ``0.4 s``, ``34 s``, ``2 min 5 s``, ``3 h 4 min``, ``6 d 2 h``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, small, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def _every(dag: Dag) -> str:
    """Return the schedule in words: ``every 6 h``; the cron expression where it has no even rhythm."""
    interval = schedule_interval(dag)
    if interval is None:
        return "manual"
    if interval["__type"] == "CronExpression":
        return str(interval["value"])
    return f"every {duration(timedelta(days=interval['days'], seconds=interval['seconds']).total_seconds())}"
