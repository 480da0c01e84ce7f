"""Who tells people about alerts: the notifier, its memory and its channels."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime

from clinical_orchestration.alerts.model import Alert, Notifier, Severity
from clinical_orchestration.alerts.policy import Kind, OpenAlert, Rules, raised

_logger = logging.getLogger("clinical_orchestration.alerts")
_LEVELS = {
    Severity.INFO: logging.INFO,
    Severity.WARNING: logging.WARNING,
    Severity.ERROR: logging.ERROR,
    Severity.CRITICAL: logging.CRITICAL,
}


class LogNotifier:
    """Tells the log only, and remembers what is open for as long as the process lives."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules or Rules()
        self._open: dict[str, OpenAlert] = {}
        self._lock = threading.Lock()

    def send(self, alert: Alert) -> bool:
        """Open or update an alert."""
        with self._lock:
            kind, self._open[alert.key] = raised(
                self._open.get(alert.key), alert.severity, datetime.now(UTC), self._rules
            )
        if kind is Kind.UPDATED:
            return False
        _logger.log(_LEVELS[alert.severity], "alert %s [%s] %s: %s", kind, alert.key, alert.title, alert.what)
        return True

    def resolve(self, key: str, note: str = "") -> bool:
        """Close an alert."""
        with self._lock:
            known = self._open.pop(key, None) is not None
        if known:
            _logger.info("alert resolved [%s] %s", key, note)
        return known


def build_notifier() -> Notifier:
    """Return the notifier of this deployment."""
    return LogNotifier()
