"""What an alert is, and the interface that whoever raises one uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Severity(StrEnum):
    """How bad it is: `info` needs nobody, `warning` somebody this week, `error` today, `critical` now."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


@dataclass(frozen=True)
class Alert:
    """One condition that people should know about. Never holds a patient identifier or a secret.

    `key` names the condition, such as ``data_drift:cdisc-pilot``: while an alert of a key is open, raising it again
    updates it instead of sending a second message.
    """

    key: str
    severity: Severity
    title: str
    what: str
    """What happened, with figures and their bounds."""
    where: str
    """Where to look: a path below the page's address (``/dagster/...``), a URL or an ``s3://`` report."""
    action: str
    """What to do about it."""
    source: str
    """Who raises it: an asset key, a sensor, a service."""
    trial: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Notifier(Protocol):
    """Raises and resolves alerts; the resource of the key ``alerts``."""

    def send(self, alert: Alert) -> bool:
        """Open the alert of this key, or update the open one; return whether a message went out.

        A message goes out for a new key, for a higher severity, and again after the reminder interval. A channel that
        fails is logged and never raises: alerting must not fail the run that alerts.
        """

    def resolve(self, key: str, note: str = "") -> bool:
        """Close the open alert of `key`, with a message; return whether one was open."""
