"""``/health`` in the JSON shape of Airflow 2.11, with states that are asked for, not remembered.

Who stands for whom: the scheduler is Dagster's scheduler daemon, the triggerer its sensor daemon, the DAG processor
the code servers. A daemon writes its heartbeat about once a minute, which alone would show a death a minute late, so
that its process is looked at too wherever an embedded stack says which one it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from clinical_orchestration.instance import DAEMON_HEARTBEAT_SECONDS
from clinical_orchestration.page.bounded import Bounded
from clinical_orchestration.page.stack_state import Service

LIMIT_SECONDS = 2.5
DAEMON_SERVICES = ("daemon", "dagster_daemon", "dagster-daemon")

_logger = logging.getLogger("clinical_orchestration.page")


@dataclass(frozen=True)
class Health:
    """State of the four parts; times are those of the latest sign of life (UTC), None where there never was one."""

    metadatabase: bool
    scheduler: bool
    triggerer: bool
    dag_processor: bool
    scheduler_heartbeat: datetime | None = None
    triggerer_heartbeat: datetime | None = None
    dag_processor_heartbeat: datetime | None = None

    @property
    def healthy(self) -> bool:
        """Whether all four are."""
        return self.metadatabase and self.scheduler and self.triggerer and self.dag_processor

    def as_airflow(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON of Airflow's ``/health``."""

        def part(name: str, good: bool, heartbeat: datetime | None) -> dict[str, str | None]:
            return {
                "status": "healthy" if good else "unhealthy",
                f"latest_{name}_heartbeat": heartbeat.isoformat() if heartbeat else None,
            }

        return {
            "metadatabase": {"status": "healthy" if self.metadatabase else "unhealthy"},
            "scheduler": part("scheduler", self.scheduler, self.scheduler_heartbeat),
            "triggerer": part("triggerer", self.triggerer, self.triggerer_heartbeat),
            "dag_processor": part("dag_processor", self.dag_processor, self.dag_processor_heartbeat),
        }


def daemon_is_healthy(heartbeat: float | None, now: float, process: Service | None) -> bool:
    """Judge a daemon by its latest heartbeat and, where it is known, by its process.

    Args:
        heartbeat: seconds since the epoch, None where there never was one.
        now: seconds since the epoch.
        process: what the supervisor knows of the daemon's process; None where none supervises it.

    A heartbeat of an earlier process of the same daemon proves nothing about the present one.
    """
    if heartbeat is None or now - heartbeat > DAEMON_HEARTBEAT_SECONDS:
        return False
    if process is None:
        return True
    if not process.alive:
        return False
    return process.started_at is None or heartbeat >= process.started_at - 1.0


class HealthMonitor:
    """Asks database, daemons and code servers; every answer comes within a limit.

    Args:
        heartbeats: asks the database; daemon type -> seconds since the epoch. Raises where the database fails.
        code_servers: returns when every code server answered a ping. Raises where one does not.
        daemon_process: what is known of the daemon's process.
        clock: seconds since the epoch.
        limit_seconds: longest wait for one of them.
    """

    def __init__(
        self,
        heartbeats: Callable[[], Mapping[str, float]],
        code_servers: Callable[[], None],
        daemon_process: Callable[[], Service | None],
        clock: Callable[[], float] = time.time,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self._heartbeats = Bounded(heartbeats, limit_seconds)
        self._code_servers = Bounded(code_servers, limit_seconds)
        self._daemon_process = daemon_process
        self._clock = clock
        self._known: dict[str, float] = {}
        self._pinged: float | None = None

    async def check(self) -> Health:
        """Return the present state; never raises."""
        beats, ping = await asyncio.gather(self._heartbeats(), self._code_servers(), return_exceptions=True)
        now = self._clock()
        database = not isinstance(beats, BaseException)
        if isinstance(beats, BaseException):
            _logger.warning("the database does not answer: %s", type(beats).__name__)
        else:
            self._known = dict(beats)
        if not isinstance(ping, BaseException):
            self._pinged = now
        process = self._daemon_process()

        def daemon(kind: str) -> tuple[bool, datetime | None]:
            beat = self._known.get(kind)
            # without the database a daemon can do nothing, whatever its process does
            return database and daemon_is_healthy(beat, now, process), _moment(beat)

        scheduler, scheduler_beat = daemon("SCHEDULER")
        sensor, sensor_beat = daemon("SENSOR")
        return Health(
            metadatabase=database,
            scheduler=scheduler,
            triggerer=sensor,
            dag_processor=not isinstance(ping, BaseException),
            scheduler_heartbeat=scheduler_beat,
            triggerer_heartbeat=sensor_beat,
            dag_processor_heartbeat=_moment(self._pinged),
        )


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def postgres_heartbeats(url: str) -> dict[str, float]:
    """Read the daemons' heartbeats from the instance's database over a connection of its own.

    A connection of its own says whether the database takes new ones, with limits on connecting and on the query.

    Returns:
        Daemon type -> seconds since the epoch; empty before the first daemon ran.
    """
    import psycopg2

    connection = psycopg2.connect(
        url, connect_timeout=2, application_name="clinical-page-health", options="-c statement_timeout=2000"
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('daemon_heartbeats') IS NOT NULL")
            row = cursor.fetchone()
            if row is None or not row[0]:
                return {}
            # the column `timestamp` has no zone; the serialised heartbeat holds seconds since the epoch
            cursor.execute("SELECT daemon_type, body::json ->> 'timestamp' FROM daemon_heartbeats")
            return {str(kind): float(seconds) for kind, seconds in cursor.fetchall()}
    finally:
        connection.close()


def instance_heartbeats(instance: Any) -> dict[str, float]:
    """Read the heartbeats through the instance, for storages other than PostgreSQL."""
    return {kind: beat.timestamp for kind, beat in instance.get_daemon_heartbeats().items()}
