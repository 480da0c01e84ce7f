"""``/metrics`` in Prometheus' text format: the families of Grafana's Airflow mixin by their names, and ours.

Everything is counted in the database when it is asked for, so that a restart of the page loses nothing. What the
database would have said is absent while it does not answer; `clinical_database_up` then says so.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from clinical_orchestration.airflow.catalog import DEFAULT_POOL, DEFAULT_SLOTS
from clinical_orchestration.airflow.figures import Figures, read_figures
from clinical_orchestration.alerts.model import Severity
from clinical_orchestration.page.alerts import read_alerts
from clinical_orchestration.page.bounded import Bounded
from clinical_orchestration.page.stack_state import read_stack_state

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
    from starlette.requests import Request

    from clinical_orchestration.airflow.control import Control

FRESH_SECONDS = 5.0
LIMIT_SECONDS = 4.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_RUN_STATES = ("queued", "running", "success", "failed")
_TASK_STATES = ("success", "failed", "skipped", "upstream_failed")

_logger = logging.getLogger("clinical_orchestration.page")


class Rising:
    """Keeps totals from falling when runs are deleted: Prometheus takes a fall for a restart and counts all anew."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}
        self._shown: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, value: float) -> float:
        """Return the total to show for `value`, which is counted now."""
        with self._lock:
            self._shown[key] = self._shown.get(key, 0.0) + max(0.0, value - self._last.get(key, 0.0))
            self._last[key] = value
            return self._shown[key]


class Metrics:
    """Reads and writes the metrics.

    Args:
        control: returns the DAGs and runs; None where there is no database.
        postgres_url: where the alerts are; it is shown nowhere.
        status_file: what the supervisor of an embedded stack writes.
    """

    def __init__(self, control: Callable[[], Control | None], postgres_url: str, status_file: Path | None) -> None:
        self._control = control
        self._url = postgres_url
        self._status_file = status_file
        self._rising = Rising()
        self._bounded = Bounded(self.text, LIMIT_SECONDS, fresh_seconds=FRESH_SECONDS)

    async def answer(self, request: Request) -> Response:
        """Answer ``GET /metrics``; requests within some seconds share one answer."""
        try:
            content = await self._bounded()
        except TimeoutError:
            content = self.without_database()
        return Response(content, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    def text(self) -> bytes:
        """Return all metrics; never raises."""
        try:
            control = self._control()
            if control is None:
                raise ConnectionError("no database is configured")
            families = [*self._airflow(control), *self._alerts(), *_database(up=True)]
        except Exception as error:
            _logger.warning("the metrics cannot be read: %s", type(error).__name__)
            families = [*_database(up=False)]
        return _written([*families, *self._services()])

    def without_database(self) -> bytes:
        """Return what can be told while the database does not answer."""
        return _written([*_database(up=False), *self._services()])

    # --- Airflow's --------------------------------------------------------------------------------------------------

    def _airflow(self, control: Control) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

        from clinical_orchestration.instance import pool_slots

        catalog = control.catalog()
        figures = read_figures(control)
        tasks = [(dag.dag_id, task_id) for dag in catalog.dags.values() for task_id in dag.tasks]

        yield GaugeMetricFamily(
            "airflow_dag_processing_import_errors", "Code locations that do not load.", len(catalog.import_errors)
        )
        for state in ("success", "failed"):
            summary = SummaryMetricFamily(
                f"airflow_dagrun_duration_{state}", f"Seconds of runs that ended as {state}.", labels=["dag_id"]
            )
            for dag_id in catalog.dags:
                self._add(summary, (dag_id,), figures.attempts.get((dag_id, state), (0, 0.0)))
            yield summary
        delay = SummaryMetricFamily(
            "airflow_dagrun_schedule_delay", "Seconds from a tick to the start of its run.", labels=["dag_id"]
        )
        for dag_id, dag in catalog.dags.items():
            if dag.cron is not None:
                self._add(delay, (dag_id,), figures.delays.get(dag_id, (0, 0.0)))
        yield delay

        # these two have no suffix in the mixin, which the client library puts on every counter
        failures = Metric("airflow_ti_failures", "Attempts at tasks that failed.", "unknown")
        for dag_id, task_id in tasks:
            count = figures.tries.get((dag_id, task_id, "failed"), (0, 0.0))[0]
            shown = self._rising(("ti_failures", dag_id, task_id), count)
            failures.add_sample("airflow_ti_failures", {"dag_id": dag_id, "task_id": task_id}, shown)
        yield failures
        missed = Metric("airflow_sla_missed", "Missed SLAs; no pipeline has one.", "unknown")
        missed.add_sample("airflow_sla_missed", {}, 0)
        yield missed

        finished = CounterMetricFamily(
            "airflow_task_finish", "Attempts at tasks that ended.", labels=["dag_id", "task_id", "state"]
        )
        duration = SummaryMetricFamily(
            "airflow_dag_task_duration", "Seconds of attempts at tasks.", labels=["dag_id", "task_id"]
        )
        for dag_id, task_id in tasks:
            counted = {state: figures.tries.get((dag_id, task_id, state), (0, 0.0)) for state in ("success", "failed")}
            for state in _TASK_STATES:
                number = counted[state][0] if state in counted else figures.passed_over.get((dag_id, task_id, state), 0)
                finished.add_metric(
                    [dag_id, task_id, state], self._rising(("task_finish", dag_id, task_id, state), number)
                )
            total = sum(count for count, _ in counted.values()), sum(seconds for _, seconds in counted.values())
            self._add(duration, (dag_id, task_id), total)
        yield finished
        yield duration

        slots = {DEFAULT_POOL: DEFAULT_SLOTS, **pool_slots(control.instance())}
        yield from _pools(figures, slots, _most_runs(control))
        yield from _ours(figures, catalog.dags)

    def _add(self, summary: SummaryMetricFamily, labels: tuple[str, ...], value: tuple[int, float]) -> None:
        count, seconds = (self._rising((summary.name, part, *labels), number) for part, number in enumerate(value))
        summary.add_metric(list(labels), int(count), seconds)

    # --- ours -------------------------------------------------------------------------------------------------------

    def _alerts(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        try:
            found = Counter(view.alert.severity for view in read_alerts(self._url, limit=10_000).open)
        except Exception as error:
            _logger.warning("the alerts cannot be counted: %s", type(error).__name__)
            return
        yield _gauge(
            GaugeMetricFamily("clinical_alerts_open", "Alerts that are open.", labels=["severity"]),
            {(severity.value,): found[severity] for severity in Severity},
        )

    def _services(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        state = read_stack_state(self._status_file)
        if state is None:
            return
        up = GaugeMetricFamily("clinical_service_up", "Whether a service is healthy.", labels=["service", "level"])
        latency = GaugeMetricFamily(
            "clinical_service_latency_seconds", "Duration of the latest readiness request.", labels=["service", "level"]
        )
        for service in state.services:
            labels = [service.name, str(service.level)]
            up.add_metric(labels, float(service.shown_state == "healthy" and not state.stale))
            if service.latency_ms is not None:
                latency.add_metric(labels, service.latency_ms / 1000)
        yield up
        yield latency
        yield GaugeMetricFamily(
            "clinical_stack_report_age_seconds", "Age of what the supervisor reported last.", state.age_seconds
        )


def _database(*, up: bool) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    yield GaugeMetricFamily("clinical_database_up", "Whether the platform's database answers.", float(up))


def _pools(figures: Figures, slots: Mapping[str, int], most_runs: float) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    opened = {pool: max(0, limit - figures.running.get(pool, 0)) for pool, limit in slots.items()}
    ready = {pool: min(figures.waiting.get(pool, 0), opened[pool]) for pool in slots}
    starving = {pool: figures.waiting.get(pool, 0) - ready[pool] for pool in slots}
    running = {pool: figures.running.get(pool, 0) for pool in slots}
    texts = {
        "airflow_scheduler_tasks_executable": ("Tasks that could begin now.", sum(ready.values())),
        "airflow_scheduler_tasks_starving": ("Tasks that wait for a slot of their pool.", sum(starving.values())),
        "airflow_executor_running_tasks": ("Tasks that run.", sum(figures.running.values())),
        "airflow_executor_queued_tasks": ("Tasks that wait for their start.", sum(figures.waiting.values())),
        "airflow_executor_open_slots": ("Runs that could begin now.", max(0.0, most_runs - figures.in_progress)),
    }
    for name, (text, value) in texts.items():
        yield GaugeMetricFamily(name, text, value)
    for name, text, values in (
        ("airflow_pool_running_slots", "Slots of a pool in use.", running),
        ("airflow_pool_queued_slots", "Tasks of a pool that could begin now.", ready),
        ("airflow_pool_starving_tasks", "Tasks that wait for a slot of the pool.", starving),
        ("airflow_pool_open_slots", "Free slots of a pool.", opened),
    ):
        family = GaugeMetricFamily(name, text, labels=["pool_name"])
        yield _gauge(family, {(pool,): value for pool, value in values.items()})


def _ours(figures: Figures, dags: Iterable[str]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    yield _gauge(
        GaugeMetricFamily("clinical_runs", "Runs that are stored.", labels=["pipeline", "state"]),
        {(dag_id, state): figures.runs.get((dag_id, state), 0) for dag_id in dags for state in _RUN_STATES},
    )
    yield GaugeMetricFamily("clinical_run_queue_length", "Runs in the queue.", figures.queued)
    since = figures.queued_since
    waited = (datetime.now(UTC) - since).total_seconds() if since is not None else 0.0
    yield GaugeMetricFamily("clinical_run_queue_oldest_seconds", "How long the oldest has waited.", max(0.0, waited))
    yield _gauge(
        GaugeMetricFamily("clinical_sensor_ticks", "Ticks in the last hour.", labels=["sensor", "status"]),
        figures.ticks,
    )


def _gauge(family: GaugeMetricFamily, values: Mapping[Any, float]) -> Metric:
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    return family


def _most_runs(control: Control) -> float:
    """Return how many runs may be in progress at once."""
    most = control.instance().get_concurrency_config().run_queue_config
    limit = most.max_concurrent_runs if most is not None else -1
    return float("inf") if limit is None or limit < 0 else float(limit)


def _written(families: Iterable[Metric]) -> bytes:
    from prometheus_client import generate_latest

    class Collected:
        def collect(self) -> Iterable[Metric]:
            return families

    return generate_latest(Collected())
