"""What the supervisor of an embedded stack wrote about its services.

The supervisor keeps ``run/status.json`` in the stack's folder. On a cluster there is none, and nothing here applies.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALE_SECONDS = 15.0


@dataclass(frozen=True)
class Service:
    """One service as last seen. `latency_ms` is the duration of its readiness request."""

    name: str
    title: str
    level: int
    state: str
    pid: int | None = None
    port: int | None = None
    url: str | None = None
    latency_ms: float | None = None
    restarts: int = 0
    error: str | None = None
    cure: str | None = None
    note: str | None = None
    started_at: float | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs now; asked of the system, so that a death shows before the supervisor sees it."""
        return self.pid is not None and process_alive(self.pid)

    @property
    def shown_state(self) -> str:
        """The state to show: a process that is gone is not healthy, nor one that failed and is being started again."""
        gone = self.state == "healthy" and self.pid is not None and not self.alive
        return "unhealthy" if gone or (self.state == "starting" and self.restarts) else self.state


@dataclass(frozen=True)
class StackState:
    """All services, and how old the report is in seconds."""

    services: tuple[Service, ...]
    age_seconds: float

    @property
    def stale(self) -> bool:
        """Whether the supervisor stopped reporting."""
        return self.age_seconds > STALE_SECONDS

    def service(self, name: str) -> Service | None:
        """Return one service, or None."""
        return next((service for service in self.services if service.name == name), None)


def process_alive(pid: int) -> bool:
    """Say whether a process runs: it exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
        try:  # a system without /proc
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return state not in ("Z", "X")


def read_stack_state(path: Path | None) -> StackState | None:
    """Return what the supervisor last wrote, or None where no stack runs here or the file cannot be read."""
    if path is None:
        return None
    try:
        age = time.time() - path.stat().st_mtime
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = Service.__dataclass_fields__
        services = tuple(
            Service(**{"title": "", **{key: value for key, value in item.items() if key in names}})
            for item in data.get("services", [])
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return StackState(services, max(0.0, age))
