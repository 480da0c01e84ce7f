"""Alerts of workers that run beside the pipelines: raised when one cannot work for a while, resolved when it can."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from clinical_orchestration.alerts.model import Alert, Notifier, Severity

DEGRADED_SECONDS = 300.0
"""How long a worker may be without what it works on before people are told: restarts take less."""

_log = logging.getLogger(__name__)


class WorkerAlerts:
    """The alerts of one worker. A notifier that fails is logged: telling must not stop the work.

    Args:
        notifier: makes the notifier, when it is first needed; None tells nobody.
        name: the worker, such as ``mq_bridge``; leads the keys of its alerts.
        title: the worker as people call it.
        where: where to look.
        after: seconds of `degraded` before the alert.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        notifier: Callable[[], Notifier] | None,
        name: str,
        title: str,
        where: str,
        *,
        after: float = DEGRADED_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = notifier
        self._notifier: Notifier | None = None
        self._name, self._title, self._where = name, title, where
        self._after, self._clock = after, clock
        self._since: float | None = None
        self._told: bool | None = None  # None: an earlier process may have told

    def working(self) -> None:
        """The worker works: an alert that it cannot is over."""
        self._since = None
        if self._told is not False:
            self._told = False
            self._act(lambda notifier: notifier.resolve(f"{self._name}:degraded", f"The {self._title} works again."))

    def degraded(self, error: str, action: str) -> None:
        """The worker cannot work; told once this has lasted long enough."""
        now = self._clock()
        self._since = self._since if self._since is not None else now
        if self._told is True or now - self._since < self._after:
            return
        self._told = True
        what = f"For {(now - self._since) / 60:.0f} minutes: {error}"
        self.tell("degraded", Severity.ERROR, f"The {self._title} cannot work", what, action)

    def tell(self, condition: str, severity: Severity, headline: str, what: str, action: str) -> None:
        """Raise the alert of a condition of this worker."""
        alert = Alert(
            key=f"{self._name}:{condition}",
            severity=severity,
            title=headline,
            what=what,
            where=self._where,
            action=action,
            source=self._name,
        )
        self._act(lambda notifier: notifier.send(alert))

    def _act(self, act: Callable[[Notifier], object]) -> None:
        if self._make is None:
            return
        try:
            self._notifier = self._notifier or self._make()
            act(self._notifier)
        except Exception as error:
            _log.warning("an alert of the %s was not passed on: %s", self._title, type(error).__name__)
