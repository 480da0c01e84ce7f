"""What the stack reports: events while it works, and the state of each service.

Plain dataclasses, so that the command line imports them without starting anything; ``as_dict`` gives JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

LEVELS: tuple[str, ...] = (
    "infrastructure",
    "data ingestion",
    "data processing",
    "feature engineering",
    "ML pipeline",
    "orchestration",
)
"""Names of the levels 0 to 5; a level needs all below it."""

MAX_LEVEL = len(LEVELS) - 1


class State(StrEnum):
    """State of one service.

    ``unhealthy`` covers a service that died and waits for its restart, and one that runs but does not answer.
    ``not_installed`` is a service whose files could not be had; the stack runs without it. ``off`` is an optional
    service that nobody asked for.
    """

    HEALTHY = "healthy"
    STARTING = "starting"
    UNHEALTHY = "unhealthy"
    STOPPED = "stopped"
    NOT_INSTALLED = "not_installed"
    OFF = "off"


@dataclass(frozen=True)
class Event:
    """One thing that happened while the stack was started, stopped or set up.

    ``progress`` is the finished share (0 to 1) where a size is known. ``at`` is seconds since the epoch (UTC).
    """

    kind: Literal["info", "jars", "service", "error"]
    message: str
    at: float
    service: str | None = None
    state: State | None = None
    progress: float | None = None


OnEvent = Callable[[Event], None]
"""Receives events in order, in the caller's thread; must return quickly."""


@dataclass
class ServiceStatus:
    """State of one service, as last seen.

    Units: ``latency_ms`` is the duration of the last readiness request, ``rss_mb`` the resident memory of the
    service's process tree, ``started_at`` seconds since the epoch (UTC). ``error`` is the last error and stays after
    a restart for the record; ``cure`` says what to do about it.
    """

    name: str
    level: int
    state: State = State.STOPPED
    pid: int | None = None
    port: int | None = None
    url: str | None = None
    latency_ms: float | None = None
    restarts: int = 0
    error: str | None = None
    cure: str | None = None
    rss_mb: float | None = None
    started_at: float | None = None
    title: str = ""
    log: str | None = None
    note: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: the service answers, or the stack is complete without it."""
        return self.state in (State.HEALTHY, State.NOT_INSTALLED, State.OFF)


@dataclass
class StackStatus:
    """State of a whole stack.

    ``level`` is the highest level wanted (-1: stopped); ``supervisor_pid`` is ``None`` when no supervisor runs.
    ``error`` says why the last start or the supervisor failed as a whole.
    """

    home: str
    level: int
    services: list[ServiceStatus] = field(default_factory=list)
    supervisor_pid: int | None = None
    started_at: float | None = None
    start_seconds: float | None = None
    error: str | None = None
    cure: str | None = None

    def service(self, name: str) -> ServiceStatus:
        """Return one service's state; ``KeyError`` names the known ones."""
        for service in self.services:
            if service.name == name:
                return service
        known = ", ".join(service.name for service in self.services)
        raise KeyError(f"no service {name!r}; known: {known}")

    def healthy_up_to(self, level: int) -> bool:
        """Whether every service of levels 0 to ``level`` is healthy, or not installed by circumstance."""
        wanted = [service for service in self.services if service.level <= level]
        return bool(wanted) and self.error is None and all(service.ok for service in wanted)

    @property
    def rss_mb(self) -> float:
        """Resident memory of all services together, in MB."""
        return sum(service.rss_mb or 0.0 for service in self.services)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StackStatus:
        """Build from :meth:`as_dict`; unknown fields of other versions are left out."""
        own = {key: value for key, value in data.items() if key in cls.__dataclass_fields__ and key != "services"}
        names = ServiceStatus.__dataclass_fields__
        services = []
        for item in data.get("services", []):
            known = {key: value for key, value in item.items() if key in names}
            services.append(ServiceStatus(**{**known, "state": State(known["state"])}))
        return cls(**own, services=services)


class StackError(Exception):
    """A start, stop or set-up failed; ``cure`` says what to do about it."""

    def __init__(self, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.cure = cure

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n{self.cure}" if self.cure else message
